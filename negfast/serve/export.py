"""`negfast export`: a run as a Hugging Face directory, with all that predicting and scoring need without negfast."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar, enable_progress_bar

from negfast.data.dataset import refuse_data_folder
from negfast.data.features import CONSTANTS, HistoryFeatures
from negfast.data.log import DAY
from negfast.data.shards import GAPS
from negfast.errors import InputError
from negfast.files import atomic_directory, check_output, locked
from negfast.model.histories import MIXED
from negfast.model.lora import merge_adapters
from negfast.model.policy import Policy
from negfast.runtime.checkpoint import read_state
from negfast.runtime.engine import Engine
from negfast.runtime.run_folder import RunFolder
from negfast.sid.prior import MARKERS, DevicePrior
from negfast.sid.tokens import FEEDBACK
from negfast.sid.trie import Trie

DESCRIPTION = "negfast.json"
FORMAT = 6  # of an export


def export_run(run: Path, out: Path) -> None:
    """Writes a run as it stands at its data set's end to the directory ``out``, as docs/serving.md describes it:
    safetensors and JSON.

    The code block is merged into the model's vocabulary: input rows are the block's (that of <|none|> is zero), output
    rows those seen through its head, so logits are the policy's before the community prior. An export that is there is
    replaced. Raises InputError where ``out`` holds anything else, for a run with ``history.text``, whose vectors have
    no place in a stock decoder, and as `RunFolder.finished_engine`.
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
    verdict = {name: value.cpu().numpy() for name, value in engine.policy.verdict.state_dict().items()}
    tensors = {"trie": trie_tensors(engine.trie, engine.histories.prior), "verdict": verdict}
    tensors["trie"]["tokens"] = engine.histories.item_tokens
    tensors["features"] = feature_tensors(engine.features)
    ids = {
        "items": {"id": engine.data.items.ids, "text": engine.data.items.text},
        "users": {"id": engine.data.user_ids},
        DESCRIPTION.removesuffix(".json"): description(folder, engine),
    }
    with atomic_directory(out) as temporary:
        disable_progress_bar()
        model.save_pretrained(temporary, safe_serialization=True)
        enable_progress_bar()
        tokenizer.save_pretrained(temporary)
        for name, arrays in tensors.items():
            save_file(
                {key: np.ascontiguousarray(array) for key, array in arrays.items()}, temporary / f"{name}.safetensors"
            )
        for name, content in ids.items():
            (temporary / f"{name}.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")


def description(folder: RunFolder, engine: Engine) -> dict[str, Any]:
    """What negfast.json says."""
    vocabulary, config = engine.policy.vocabulary, engine.config
    names = ("none", *FEEDBACK, "gap-0", *MARKERS)
    shown = folder.shown_calibration if read_state(folder.final).get("shown_calibration") else None
    return {
        "format": FORMAT,
        "layout": config.history.positions,
        "moment": (int(engine.log.time.max()) // DAY + 1) * DAY,
        "base": vocabulary.base,
        "levels": vocabulary.levels,
        "codebook": vocabulary.codebook,
        "tokens": {name: vocabulary.marker(name) for name in names} | {"codes": vocabulary.code_base(1)},
        "history": {"context": config.history.context, "window": config.history.window, "view": MIXED, "gaps": GAPS},
        "prior": asdict(config.prior),
        "beam": config.eval.beam,
        "calibration": {
            "feedback": asdict(folder.calibration),
            "shown": None if shown is None else asdict(shown),
        },
        "features": feature_spec(engine.features),
    }


def feature_spec(features: HistoryFeatures) -> dict[str, Any]:
    """What the features' columns are called, and what their formulas need beside `feature_tensors`."""
    shapes = zip(features.items.attributes, features.item_side.shapes, strict=True)
    return {
        "names": features.names,
        "prior_rate": features.prior_rate,
        "prior_value": features.prior_value,
        "constants": CONSTANTS,
        "attributes": [
            {"name": name, "columns": columns, "missing": None if np.isnan(missing) else missing}
            for name, (columns, missing) in shapes
        ],
    }


def feature_tensors(features: HistoryFeatures) -> dict[str, np.ndarray]:
    """The state of the features at the log's end, and what they know of items beside events."""
    _, text, cell, start, value = features.item_columns
    of_items = {"item.text": text, "item.cell": cell, "values_of.start": start, "values_of.value": value}
    return features.live().state.tables() | of_items


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


def trie_tensors(trie: Trie, prior: DevicePrior) -> dict[str, np.ndarray]:
    """The trie as named arrays, and ``mass.l`` [2, n_l] of the nodes of level l at the end of the prior's last day, for
    both branches; level 0 is the root. See `negfast.sid.trie.Trie` for their meaning."""
    tensors = {"leaf_item": trie.leaf_item, "item_nodes": trie.item_nodes}
    for level, (first, bits) in enumerate(zip(trie.first_child, trie.child_bits, strict=True)):
        tensors[f"first_child.{level}"] = first
        tensors[f"child_bits.{level}"] = bits
    device = prior.levels[0].mass.device
    last_day = torch.tensor(prior.levels[0].days - 1, device=device)
    for level, count in enumerate(trie.node_counts[1:], start=1):
        nodes = torch.arange(count, device=device)
        tensors[f"mass.{level}"] = torch.stack([prior.mass(level, b, last_day, nodes) for b in (0, 1)]).cpu().numpy()
    return tensors

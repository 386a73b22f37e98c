"""Where a policy comes from: the built-in small Qwen3, a local Hugging Face decoder, or a run's own folder."""

from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from negfast.config import Model
from negfast.errors import InputError
from negfast.model.lora import add_adapters
from negfast.model.policy import Policy, embedding_rows
from negfast.sid.tokens import CodeVocabulary

END_OF_TEXT = "<|endoftext|>"


def build_policy(
    config: Model,
    model_dir: Path | None,
    texts: list[str],
    levels: int,
    codebook: int,
    verdict_features: int,
    text_width: int = 0,
) -> tuple[Policy, PreTrainedTokenizerBase]:
    """A policy without adapters: from ``model_dir`` where given, else the built-in Qwen3 of ``config``.

    The built-in model's byte-level BPE is trained on ``texts``. Raises InputError where ``model_dir`` is not a local
    decoder. Remote code is never run, and weights are read from safetensors only.
    """
    if model_dir is None:
        tokenizer = train_tokenizer(texts, config.text_vocab)
        model = small_qwen3(config, len(tokenizer))
    else:
        check_model_folder(model_dir)
        try:
            tokenizer = AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
            model = AutoModelForCausalLM.from_pretrained(
                model_dir, local_files_only=True, use_safetensors=True, dtype=torch.float32
            )
        except (OSError, ValueError) as error:
            raise InputError(f"{model_dir}: cannot be read as a decoder: {first_line(error)}") from error
    vocabulary = CodeVocabulary(len(embedding_rows(model)), levels, codebook)
    return Policy(model, vocabulary, verdict_features, text_width), tokenizer


def check_model_folder(folder: Path) -> None:
    """InputError where ``folder`` plainly is no local Hugging Face model."""
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder}: found no config.json, expected a local Hugging Face decoder")


def save_model_files(policy: Policy, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """What a run needs to rebuild its policy without the model it came from: configuration and tokenizer."""
    policy.decoder.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def rebuild_policy(
    folder: Path, adapters: Model, levels: int, codebook: int, verdict_features: int, text_width: int
) -> tuple[Policy, PreTrainedTokenizerBase]:
    """The policy of a run, with the ``adapters`` of its settings, from the folder that ``save_model_files`` wrote; its
    weights come from a checkpoint."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    with torch.random.fork_rng(devices=[]):  # weights are replaced: leave the caller's stream of numbers alone
        model = AutoModelForCausalLM.from_config(config)
        vocabulary = CodeVocabulary(len(embedding_rows(model)), levels, codebook)
        policy = Policy(model, vocabulary, verdict_features, text_width)
        add_adapters(policy, adapters)
    return policy, AutoTokenizer.from_pretrained(folder, local_files_only=True)


def small_qwen3(config: Model, vocab_size: int) -> PreTrainedModel:
    """A randomly initialised Qwen3 of the configured shape. InputError where the shape is none."""
    if config.heads % config.kv_heads:
        raise InputError(f"model.heads: found {config.heads}, expected a multiple of model.kv_heads={config.kv_heads}")
    if config.head_dim % 2:
        raise InputError(f"model.head_dim: found {config.head_dim}, expected an even number")
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocab_size,
            hidden_size=config.hidden,
            intermediate_size=config.intermediate,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            head_dim=config.head_dim,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
            use_sliding_window=False,
        )
    )


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE of at most ``vocab_size`` tokens (at least the 256 bytes) trained on the item texts."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=vocab_size, min_frequency=2, special_tokens=[END_OF_TEXT])
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT)


def first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__

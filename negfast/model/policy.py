"""The policy: a stock transformers decoder plus a code block of its own, driven over a group layout.

The code block holds the rows of markers and semantic-ID codes. It is a Parameter apart from the model's vocabulary,
so a code never touches the text rows: not forward, not backward, not in the optimiser.
"""

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from negfast.errors import InputError
from negfast.model import attention
from negfast.model.layout import GroupLayout, PromptRows
from negfast.model.qwen3 import Qwen3
from negfast.model.verdict_prior import VerdictPrior
from negfast.sid.tokens import MARKERS, CodeVocabulary
from negfast.spans import span

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class CodeBlock(nn.Module):
    """Rows of markers and codes, tied between input and output through ``head``.

    A logit is head(hidden) . row, a code's times ``scale`` (chosen by `negfast.train.validation.Validation`). ``head``
    starts at zero, so that every code logit does too: with the community prior the untrained policy is exactly the
    decay ranking.
    """

    scale: Tensor

    def __init__(self, size: int, hidden: int, std: float) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.randn(size, hidden) * std)
        self.head = nn.Linear(hidden, hidden, bias=False)
        nn.init.zeros_(self.head.weight)
        self.register_buffer("scale", torch.ones(()))


class Policy(nn.Module):
    """``decoder`` without its head, the code block, and the text head (the decoder's own vocabulary).

    Token ids below ``vocabulary.base`` are the decoder's, the others are rows of the code block. ``in_bfloat16``
    computes the decoder's matrix products in that type (autocast); weights, head, logits and losses stay what they are.
    """

    in_bfloat16 = False
    bare_layers: tuple[nn.ModuleList, ...] = ()  # where the decoder's are sharded, what they were made of, without data

    def __init__(self, model: "PreTrainedModel | Qwen3", vocabulary: CodeVocabulary, verdict_features: int = 4) -> None:
        """``verdict_features``: columns of `negfast.data.features.HistoryFeatures.rich`."""
        super().__init__()
        self.decoder: Any
        if isinstance(model, Qwen3):
            self.decoder, self.text_head = model, model.output_embeddings()
        else:
            reject_unsupported(model)
            attention.install(model)
            self.decoder, self.text_head = model.get_decoder(), model.get_output_embeddings()
        last = self.decoder.layers[-1]
        self.drops_prompt_rows = hasattr(last, "input_layernorm") and hasattr(last, "self_attn")  # Qwen, Llama and kin
        if self.drops_prompt_rows:
            last.register_forward_pre_hook(attention.drop_prompt_rows, with_kwargs=True)
        self.vocabulary = vocabulary
        rows = embedding_rows(model)
        std = float(rows.detach().float().std())  # block rows as long as the decoder's own
        self.block = CodeBlock(vocabulary.size, rows.shape[1], std)
        self.verdict_prior = VerdictPrior(verdict_features)

    def embed(self, tokens: Tensor, has_text: bool) -> Tensor:
        """Embeddings [N, d] of token ids [N]; ``has_text`` says whether any is the decoder's own (no device sync)."""
        base = self.vocabulary.base
        codes = F.embedding((tokens - base).clamp_min(0), self.block.rows)
        if not has_text:
            return codes
        text = self.decoder.get_input_embeddings()(tokens.clamp_max(base - 1))
        return torch.where((tokens >= base).unsqueeze(-1), codes, text)

    def hidden(
        self,
        layout: GroupLayout,
        prompt_tokens: Tensor | None,
        completion_tokens: Tensor | None,
        has_text: bool = False,
        prompt_rows: PromptRows = "all",
    ) -> Tensor:
        """Final hidden states [rows + A * n, d] of a call that adds prompts [T], completion tokens [A, n], or both.

        ``prompt_rows`` says which of the prompts' come first: all T, the B of their last tokens, or none; the last
        layer computes no others. Keys and values of the call stay in the layout, with gradients where these are on.
        """
        layout.past_tokens += layout.new_tokens
        layout.holds_prompts = prompt_tokens is not None
        layout.prompt_rows = prompt_rows
        if prompt_tokens is not None:
            layout.keys.clear()
        layout.new_tokens = 0 if completion_tokens is None else completion_tokens.shape[1]
        tokens, positions = [], []
        if prompt_tokens is not None:
            tokens.append(prompt_tokens)
            positions.append(layout.positions)
        if completion_tokens is not None:
            tokens.append(completion_tokens.reshape(-1))
            positions.append(layout.completion_positions())
        embedded = self.embed(torch.cat(tokens), has_text)
        precision = torch.autocast(embedded.device.type, torch.bfloat16, enabled=self.in_bfloat16)
        with span("prompt" if prompt_tokens is not None else f"level {layout.past_tokens + 2}"), precision:
            out = self.decoder(
                inputs_embeds=embedded.unsqueeze(0),
                position_ids=torch.cat(positions).unsqueeze(0),
                use_cache=False,
                layout=layout,
            )
        hidden = out.last_hidden_state.squeeze(0).to(embedded.dtype)
        if prompt_tokens is None or prompt_rows == "all" or self.drops_prompt_rows:
            return hidden
        completions = hidden[layout.prompt_tokens :]
        return completions if prompt_rows == "none" else torch.cat([hidden[layout.last_prompt_row], completions])

    def weights_cast_once(self) -> torch.autocast:
        """Within it calls of ``hidden`` share the bfloat16 copies of trained weights, where each would make its own. To
        be left before weights change. A copy's gradients add up in bfloat16 over the calls of one backward."""
        return torch.autocast(self.block.rows.device.type, enabled=False)  # copies live until the outermost is left

    def level_rows(self, level: int) -> Tensor:
        """The block's rows [K, d] of the codes of a level in 1..L."""
        start = self.vocabulary.code_base(level) - self.vocabulary.base
        return self.block.rows[start : start + self.vocabulary.codebook]

    def code_logits(self, hidden: Tensor, level: int) -> Tensor:
        """Logits [R, K] over the codes of a level in 1..L after hidden states [R, d]."""
        return (self.block.head(hidden) * self.block.scale) @ self.level_rows(level).T

    def full_logits(self, hidden: Tensor) -> Tensor:
        """Logits [R, base + block] over the whole vocabulary, in the order of token ids."""
        block = self.block.head(hidden) @ self.output_rows().T
        return torch.cat([self.text_head(hidden), block], dim=-1)

    def output_rows(self) -> Tensor:
        """The block's rows [size, d] as the head's output meets them: those of codes times the scale."""
        first, end = len(MARKERS), len(MARKERS) + self.vocabulary.levels * self.vocabulary.codebook
        rows = self.block.rows
        return torch.cat([rows[:first], rows[first:end] * self.block.scale, rows[end:]])

    def verdict_logit(self, hidden: Tensor, features: Tensor) -> Tensor:
        """Logit [R] of P(dislike) after the verdict marker; ``features`` [R, verdict_features] its prior's."""
        yes, no = (self.vocabulary.marker(name) - self.vocabulary.base for name in ("yes", "no"))
        margin = self.block.head(hidden) @ (self.block.rows[yes] - self.block.rows[no])
        return margin + self.verdict_prior(features)


def embedding_rows(model: "PreTrainedModel | Qwen3") -> Tensor:
    """The input embedding of a model, [vocabulary, hidden]."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight


def reject_unsupported(model: "PreTrainedModel") -> None:
    """Raise InputError for decoders whose attention the group layout cannot carry."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise InputError(f"model: found layers of type {', '.join(sorted(kinds))}, expected full attention only")
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        raise InputError(f"model: found sliding_window={config.sliding_window}, expected full attention only")
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise InputError("model: activation checkpointing is on; the single pass needs it off")

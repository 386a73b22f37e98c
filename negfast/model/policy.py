"""The policy: a stock transformers decoder plus a code block of its own, driven over a group layout.

The code block holds the rows of markers and semantic-ID codes. It is a Parameter apart from the model's vocabulary,
so a code never touches the text rows: not forward, not backward, not in the optimiser.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from negfast.errors import InputError
from negfast.model import attention
from negfast.model.inference import Inference, Packed, summed_rows
from negfast.model.layout import GroupLayout
from negfast.model.qwen3 import Qwen3
from negfast.model.verdict import Verdict
from negfast.model.weight_copies import WeightCopies
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
    """``decoder`` without its head, the code block, the text head (the decoder's own vocabulary), and the verdict.

    Token ids below ``vocabulary.base`` are the decoder's, the others are rows of the code block. ``in_bfloat16``
    computes the decoder's matrix products in that type (autocast); weights, head, logits and losses stay what they are.
    """

    in_bfloat16 = False
    copies: tuple[WeightCopies, ...] = ()  # once a step asked for them
    bare_layers: tuple[nn.ModuleList, ...] = ()  # where the decoder's are sharded, what they were made of, without data

    def __init__(
        self,
        model: "PreTrainedModel | Qwen3",
        vocabulary: CodeVocabulary,
        verdict_features: int = 4,
        text_width: int = 0,
    ) -> None:
        """``verdict_features``: columns of `negfast.data.features.HistoryFeatures.rich`; ``text_width``: of
        `negfast.model.histories.item_text`, 0 without."""
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
        self.inference = Packed(Inference.of)
        rows = embedding_rows(model)
        std = float(rows.detach().float().std())  # block rows as long as the decoder's own
        self.block = CodeBlock(vocabulary.size, rows.shape[1], std)
        self.verdict = Verdict(verdict_features)
        # zero, so that a policy starts as it would without text
        self.text_projection = nn.Parameter(torch.zeros(text_width, rows.shape[1])) if text_width else None

    def embed(self, tokens: Tensor, has_text: bool = False, item_text: Tensor | None = None) -> Tensor:
        """Embeddings [N, d] of token ids [N], or of sums [N, S]: those of a row's tokens together, <|none|> nothing.

        ``has_text`` says whether any is the decoder's own (no device sync); sums have none. ``item_text`` [N, D] of any
        float type, vectors of items, is projected and added to sums.
        """
        base = self.vocabulary.base
        if tokens.ndim == 2:
            none = self.vocabulary.marker("none") - base
            sums = summed_rows(self.block.rows, tokens - base, none)
            if item_text is None:
                return sums
            assert self.text_projection is not None
            return sums + item_text.to(sums.dtype) @ self.text_projection
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
        prompt_item_text: Tensor | None = None,
    ) -> Tensor:
        """Final hidden states of a call that adds prompts, completions, or both.

        Tokens of prompts are [T], of completions [A, n], or sums [T, S] and [A, n, S]; to those of prompts item
        texts [T, D] may be added (see `embed`). The states are those of the completions [A * n, d] where there are
        any, else of the prompts [T, d]. Keys and values of the call
        stay in the layout, with gradients where these are on.
        """
        layout.past_tokens += layout.new_tokens
        layout.holds_prompts = prompt_tokens is not None
        layout.new_tokens = 0 if completion_tokens is None else completion_tokens.shape[1]
        embedded, positions = [], []
        if prompt_tokens is not None:
            layout.keys.clear()
            embedded.append(self.embed(prompt_tokens, has_text, prompt_item_text))
            positions.append(layout.positions)
        if completion_tokens is not None:
            embedded.append(self.embed(completion_tokens.flatten(0, 1), has_text))
            positions.append(layout.completion_positions())
        inputs = torch.cat(embedded)
        if torch.is_inference_mode_enabled() and not self.in_bfloat16 and not self.bare_layers:
            inference = self.inference.of(self.decoder)
            if inference is not None:
                return inference.hidden(layout, inputs, torch.cat(positions))
        precision = torch.autocast(inputs.device.type, torch.bfloat16, enabled=self.in_bfloat16)
        level = f"level {layout.past_tokens + 1}" if layout.past_tokens else "branches"
        with span("history" if prompt_tokens is not None else level), precision:
            out = self.decoder(
                inputs_embeds=inputs.unsqueeze(0),
                position_ids=torch.cat(positions).unsqueeze(0),
                use_cache=False,
                layout=layout,
            )
        hidden = out.last_hidden_state.squeeze(0).to(inputs.dtype)
        if prompt_tokens is None or completion_tokens is None or self.drops_prompt_rows:
            return hidden
        return hidden[layout.prompt_tokens :]

    def weights_cast_once(self) -> AbstractContextManager[None]:
        """Within it calls of ``hidden`` share one bfloat16 copy of each weight (`WeightCopies`)."""
        if not self.in_bfloat16 or self.bare_layers:  # sharded layers are gathered in bfloat16
            return nullcontext()
        if not self.copies:
            self.copies = (WeightCopies(self.decoder),)
        return self.copies[0].in_use()

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


def narrow_stream(policy: Policy) -> None:
    """Makes the decoder's residual stream bfloat16, from the first layer on; rotations and what comes out stay float32.
    For a policy that computes in bfloat16."""
    policy.decoder.layers[0].register_forward_pre_hook(_in_bfloat16)


def _in_bfloat16(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return args[0].to(torch.bfloat16), *args[1:]


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

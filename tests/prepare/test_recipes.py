"""Recipes: each source in a small file of its real format, and what must be refused."""

import gzip
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from negfast.data.log import DAY, DISLIKE, EXPOSED, LIKE, WITHDRAWN
from negfast.errors import InputError
from negfast.prepare.events import Selection
from negfast.prepare.recipes import RECIPES, read_recipe, withdraw
from negfast.prepare.rules import parse_rule


def silent(_):
    pass


def read(name, *files, **options):
    """Every event as (user id, item id, feedback, time, value), in the log's order, and the item table."""
    events, items, undo = read_recipe(name, files, silent, **options)
    log = events.log if undo is None else withdraw(events.log, undo)[0]
    values = [None] * len(log) if log.value is None else log.value.tolist()
    rows = zip(log.user.tolist(), log.item.tolist(), log.feedback.tolist(), log.time.tolist(), values, strict=True)
    assert items is None or items.ids == events.item_ids
    return [(events.user_ids[u], events.item_ids[i], f, t, v) for u, i, f, t, v in rows], items


KUAIRAND = (
    "user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,is_comment,is_forward,is_hate,long_view,"
    "play_time_ms,duration_ms,profile_stay_time,comment_stay_time,is_profile_enter,is_rand,tab\n"
)


def test_kuairand(tmp_path):
    first, second = tmp_path / "log_standard_4_08_to_4_21_pure.csv", tmp_path / "log_standard_4_22_to_5_08_pure.csv"
    first.write_text(
        KUAIRAND
        + "0,3784,20220408,400,1649364000123,1,0,0,0,0,0,0,6000,12000,0,0,0,0,1\n"
        + "0,12,20220408,400,1649364001999,0,0,0,0,0,1,0,900,8000,0,0,0,0,1\n"
        + "7,3784,20220409,1200,1649476800000,1,1,0,0,0,0,1,19000,12000,0,0,0,0,1\n"
    )
    second.write_text(KUAIRAND + "0,441,20220422,100,1650560400000,1,0,1,0,0,0,1,20000,12000,0,0,0,0,1\n")
    videos = tmp_path / "video_features_basic_pure.csv"
    videos.write_text(
        "video_id,author_id,video_type,upload_dt,upload_type,visible_status,video_duration,server_width,server_height,"
        "music_id,music_type,tag\n"
        '3784,441,NORMAL,2020-07-08,ShortImport,1.0,17200.0,720,1280,989206467,4.0,"12,65"\n'
        "12,9,AD,2021-01-01,LongImport,1.0,,720,1280,3,9.0,\n"
    )
    rows, items = read("kuairand", first, videos, second)
    assert rows == [
        ("0", "3784", EXPOSED, 1649364000, None),
        ("0", "12", DISLIKE, 1649364001, None),
        ("0", "441", LIKE, 1650560400, None),
        ("7", "3784", LIKE, 1649476800, None),
    ]
    assert items.ids == ["3784", "12", "441"]  # 441 is of the log only
    assert items.attributes["tag"] == [("12", "65"), (), ()]
    assert items.attributes["author_id"] == [("441",), ("9",), ()]


def yambda(path, rows):
    columns = {
        "uid": pa.array([r[0] for r in rows], pa.uint32()),
        "timestamp": pa.array([r[1] for r in rows], pa.uint32()),
        "item_id": pa.array([r[2] for r in rows], pa.uint32()),
        "is_organic": pa.array([1] * len(rows), pa.uint8()),
    }
    parquet.write_table(pa.table(columns), path)
    return path


@pytest.fixture
def yambda_files(tmp_path):
    return {
        "undislikes": yambda(tmp_path / "undislikes.parquet", [(10, 400, 5), (20, DAY + 700, 6)]),
        "dislikes": yambda(
            tmp_path / "dislikes.parquet", [(10, 400, 5), (10, 500, 6), (20, 600, 6), (20, DAY + 800, 6)]
        ),
        "likes": yambda(tmp_path / "likes.parquet", [(10, 300, 5), (30, 100, 5)]),
        "unlikes": yambda(tmp_path / "unlikes.parquet", [(30, 105, 5), (10, 505, 6)]),
        "listens": yambda(tmp_path / "listens.parquet", [(10, 100, 5), (10, 900, 6)]),
    }


def test_yambda_undislike_takes_the_dislike_back(yambda_files):
    """From its time on, and on the same day altogether, whatever order the files are given in: of equal times a
    dislike comes before its undislike."""
    expected = [
        ("10", "5", EXPOSED, 100, None),  # a listen
        ("10", "5", EXPOSED, 300, None),  # a like, and the dislike that took its place, taken back the same day
        ("10", "5", EXPOSED, 400, None),
        ("10", "5", WITHDRAWN, 400, None),
        ("10", "6", DISLIKE, 500, None),  # an unlike takes no dislike back
        ("10", "6", EXPOSED, 505, None),
        ("10", "6", EXPOSED, 900, None),  # neither does a listen
        ("20", "6", DISLIKE, 600, None),  # stood at the end of its day
        ("20", "6", WITHDRAWN, DAY + 700, None),
        ("20", "6", DISLIKE, DAY + 800, None),  # and again
        ("30", "5", EXPOSED, 100, None),
        ("30", "5", WITHDRAWN, 105, None),
    ]
    for order in (list(yambda_files), list(yambda_files)[::-1]):
        rows, items = read("yambda", *(yambda_files[name] for name in order))
        assert rows == expected and items is None


def test_yambda_multi_event(tmp_path, yambda_files):
    tables = [parquet.read_table(yambda_files[name]) for name in ("listens", "likes", "unlikes", "dislikes")]
    words = ("listen", "like", "unlike", "dislike")
    tables = [
        table.append_column("event_type", pa.array([word] * len(table)).dictionary_encode())
        for table, word in zip(tables, words, strict=True)
    ]
    path = tmp_path / "multi_event.parquet"
    parquet.write_table(pa.concat_tables(tables, promote_options="permissive").unify_dictionaries(), path)
    separate = read("yambda", *(yambda_files[f"{word}s"] for word in words))
    assert read("yambda", path) == separate
    assert sum(row[2] == DISLIKE for row in separate[0]) == 4


def test_amazon_reviews_2023(tmp_path):
    reviews, meta = tmp_path / "All_Beauty.jsonl.gz", tmp_path / "meta_All_Beauty.jsonl.gz"

    def review(rating, item, user, time, **more):
        return {
            "rating": rating, "title": "2020-01-01", "text": "So-so", "images": [], "asin": f"{item}X",
            "parent_asin": item, "user_id": user, "timestamp": time, "helpful_vote": 0, "verified_purchase": True,
            **more,
        }  # fmt: skip

    images = [{"small_image_url": "https://x/s.jpg", "attachment_type": "IMAGE"}]
    rows = [
        review(5.0, "B00YQ6X8EO", "AGKHLEW2", 1588687728923),
        review(2.0, "B081TJ8YS3", "AGKHLEW2", 1588615855070, images=images),
        review(1.0, "B000NOMETA", "AE74DYR3", 1589665266052),
    ]
    with gzip.open(reviews, "wt") as file:
        file.write("\n".join(map(json.dumps, rows)) + "\n")

    def product(item, title, price, details, categories):
        return {
            "main_category": "All Beauty", "title": title, "average_rating": 4.8, "rating_number": 10, "features": [],
            "description": [], "price": price, "images": [{"thumb": "t", "hi_res": None}], "videos": [],
            "store": "Howard Products", "categories": categories, "details": details, "parent_asin": item,
            "bought_together": None,
        }  # fmt: skip

    products = [  # price and details change their type from line to line, as they do in the source
        product("B00YQ6X8EO", "Leather Conditioner, 8-Ounce", None, {"UPC": "617390882781"}, []),
        product("B081TJ8YS3", "Yes to Tomatoes “Charcoal”", 19.99, {"Is Discontinued": True}, ["Beauty", "Skin"]),
        product("B00UNSOLD0", "Unsold", "from 3.00", {"UPC": 3}, ["Beauty"]),
    ]
    with gzip.open(meta, "wt") as file:
        file.write("\n".join(map(json.dumps, products)) + "\n")
    rows, items = read("amazon-reviews-2023", meta, reviews)
    assert rows == [
        ("AE74DYR3", "B000NOMETA", DISLIKE, 1589665266, 1.0),
        ("AGKHLEW2", "B081TJ8YS3", DISLIKE, 1588615855, 2.0),
        ("AGKHLEW2", "B00YQ6X8EO", LIKE, 1588687728, 5.0),
    ]
    assert items.ids == ["B00YQ6X8EO", "B081TJ8YS3", "B00UNSOLD0", "B000NOMETA"]
    assert items.text == ["Leather Conditioner, 8-Ounce", "Yes to Tomatoes “Charcoal”", "Unsold", ""]
    assert items.attributes["categories"] == [(), ("Beauty", "Skin"), ("Beauty",), ()]


def test_movielens(tmp_path):
    ratings, movies = tmp_path / "ratings.csv", tmp_path / "movies.csv"
    ratings.write_text("userId,movieId,rating,timestamp\n1,2,3.5,1112486027\n1,29,2.0,1112484676\n2,2,0.5,974820598\n")
    movies.write_text(
        "movieId,title,genres\n2,Jumanji (1995),Adventure|Children|Fantasy\n"
        '29,"City of Lost Children, The (Cité des enfants perdus, La) (1995)",(no genres listed)\n'
    )
    rows, items = read("movielens", ratings, movies)
    assert rows == [
        ("1", "29", DISLIKE, 1112484676, 2.0),
        ("1", "2", LIKE, 1112486027, 3.5),
        ("2", "2", DISLIKE, 974820598, 0.5),
    ]
    assert items.text[1].startswith("City of Lost Children, The (Cité")
    assert items.attributes == {"genres": [("Adventure", "Children", "Fantasy"), ()], "year": [("1995",), ("1995",)]}
    rows, _ = read("movielens", ratings, movies, dislike=[parse_rule("rating<=1")])
    assert [row[2] for row in rows] == [LIKE, LIKE, DISLIKE]
    with pytest.raises(InputError, match=r"no event matches rating<0; rating holds 3.5 \(1\), 2.0 \(1\), 0.5 \(1\)"):
        read("movielens", ratings, movies, dislike=[parse_rule("rating<=1"), parse_rule("rating<0")])


def test_movielens_1m_is_latin_1(tmp_path):
    (tmp_path / "ratings.dat").write_text("1::1193::5::978300760\n1::661::1::978302109\n")
    (tmp_path / "movies.dat").write_bytes(
        "1193::Misérables, Les (1995)::Drama\n661::James (1996)::Musical\n".encode("latin-1")
    )
    rows, items = read("movielens-dat", tmp_path / "ratings.dat", tmp_path / "movies.dat")
    assert [row[2] for row in rows] == [LIKE, DISLIKE]
    assert items.text == ["Misérables, Les (1995)", "James (1996)"]


def test_movietweetings_is_the_sample(tmp_path, movietweetings):
    from negfast.prepare.samples import MOVIETWEETINGS

    events, items, _ = read_recipe(
        "movietweetings", [MOVIETWEETINGS / "ratings.dat.zst", MOVIETWEETINGS / "movies.dat.zst"], silent
    )
    log, table = movietweetings
    np.testing.assert_array_equal(events.log.feedback, log.feedback)
    np.testing.assert_array_equal(events.log.item, log.item)
    assert items is not None
    assert (items.ids, items.text, items.attributes) == (table.ids, table.text, table.attributes)


@pytest.mark.parametrize("name", RECIPES)
def test_a_foreign_file_is_refused(name, tmp_path):
    path = tmp_path / "other.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match=f"other.csv: found .*expected for --recipe {name}"):
        read_recipe(name, [path], silent)


def test_bad_requests(tmp_path, yambda_files):
    with pytest.raises(InputError, match="expected one of kuairand"):
        read_recipe("netflix", [], silent)
    with pytest.raises(InputError, match="found no events"):
        read_recipe("movielens", [], silent)
    with pytest.raises(InputError, match="no such file"):
        read_recipe("movielens", [tmp_path / "gone.csv"], silent)
    odd = yambda_files["likes"].rename(tmp_path / "part-0.parquet")
    with pytest.raises(InputError, match=r"part-0.parquet: no column 'event_type'"):
        read_recipe("yambda", [odd], silent)


def test_polis(tmp_path):
    votes, comments = tmp_path / "votes.csv", tmp_path / "comments.csv"
    votes.write_text(
        "timestamp,datetime,comment-id,voter-id,vote\n"
        "1403054214,Wed Jun 18 2014 01:16:54 GMT+0000 (Coordinated Universal Time),10,7,1\n"
        "1403054218,Wed Jun 18 2014 01:16:58 GMT+0000 (Coordinated Universal Time),11,7,-1\n"
        "1403054219,Wed Jun 18 2014 01:16:59 GMT+0000 (Coordinated Universal Time),12,7,0\n"
    )
    comments.write_text(
        "timestamp,datetime,comment-id,author-id,agrees,disagrees,moderated,comment-body\n"
        '1403054000,Wed Jun 18 2014,11,3,0,1,1,"Pay more, and\nsoon"\n'
        "1403054001,Wed Jun 18 2014,10,3,1,0,1,Not sure I believe it\n"
    )
    rows, items = read("polis", comments, votes)
    assert rows == [
        ("7", "10", LIKE, 1403054214, None),
        ("7", "11", DISLIKE, 1403054218, None),
        ("7", "12", EXPOSED, 1403054219, None),
    ]
    assert dict(zip(items.ids, items.text, strict=True)) == {
        "11": "Pay more, and\nsoon",
        "10": "Not sure I believe it",
        "12": "",
    }


def test_community_notes(tmp_path):
    ratings, notes = tmp_path / "ratings-00000.tsv", tmp_path / "notes-00000.tsv"
    ratings.write_text(
        "noteId\traterParticipantId\tcreatedAtMillis\tversion\thelpfulnessLevel\tratedOnTweetId\n"
        "1400247230330667008\tA1\t1700000000123\t2\tNOT_HELPFUL\t5\n"
        "1400247230330667009\tA1\t1700000001999\t2\tHELPFUL\t6\n"
        "1400247230330667008\tB2\t1700000002000\t2\tSOMEWHAT_HELPFUL\t5\n"
        "1400247230330667009\tB2\t1700000003000\t1\t\t6\n"
    )
    notes.write_text(
        "noteId\tnoteAuthorParticipantId\tcreatedAtMillis\ttweetId\tclassification\tsummary\n"
        "1400247230330667008\tC3\t1699990000000\t5\tNOT_MISLEADING\tThis is satire.\n"
        "1400247230330667009\tC3\t1699990000001\t6\tMISINFORMED_OR_POTENTIALLY_MISLEADING\tThe figure is old.\n"
    )
    rows, items = read("community-notes", ratings, notes)
    first, second = items.ids
    assert rows == [
        ("A1", first, DISLIKE, 1700000000, None),
        ("A1", second, LIKE, 1700000001, None),
        ("B2", first, EXPOSED, 1700000002, None),
        ("B2", second, EXPOSED, 1700000003, None),
    ]
    assert items.text == ["This is satire.", "The figure is old."]
    assert items.attributes["classification"] == [("NOT_MISLEADING",), ("MISINFORMED_OR_POTENTIALLY_MISLEADING",)]


def vk_lsvd_week(path, rows):
    names = ("user_id", "item_id", "timespent", "like", "dislike")
    columns = dict(zip(names, zip(*rows, strict=True), strict=True))
    types = (pa.uint32(), pa.uint32(), pa.uint8(), pa.bool_(), pa.bool_())
    parquet.write_table(pa.table({n: pa.array(columns[n], t) for n, t in zip(names, types, strict=True)}), path)
    return path


def test_vk_lsvd(tmp_path):
    weeks = [
        vk_lsvd_week(tmp_path / "week_01.parquet", [(7, 50, 3, False, True), (8, 51, 9, True, False)]),
        vk_lsvd_week(tmp_path / "week_00.parquet", [(8, 50, 1, False, False)]),
    ]
    items = tmp_path / "items_metadata.parquet"
    parquet.write_table(pa.table({"item_id": [51, 50], "author_id": [4, 5], "duration": [9, 8]}), items)
    embedding = tmp_path / "item_embeddings.npz"
    np.savez(embedding, item_id=np.array([50, 99]), embedding=np.array([[1, 2], [3, 4]], np.float16))
    rows, table = read("vk-lsvd", *weeks, items, embedding)
    assert rows == [
        ("7", "50", DISLIKE, 7 * DAY, None),
        ("8", "50", EXPOSED, 0, None),
        ("8", "51", LIKE, 7 * DAY + 7 * DAY // 2, None),
    ]
    assert table.attributes["author_id"] == [("4",), ("5",)]
    assert table.embedding.tolist() == [[0, 0], [1, 2]]
    with pytest.raises(InputError, match="embedding needs the item table"):
        read("vk-lsvd", *weeks, embedding)
    np.savez(embedding, item_id=np.array([50]), embedding=np.array([[1, 2], [3, 4]]))
    with pytest.raises(InputError, match=r"item_embeddings.npz: found item_id \(1,\) and embedding \(2, 2\)"):
        read("vk-lsvd", *weeks, items, embedding)
    np.savez(embedding, rows=np.zeros((2, 2)))
    with pytest.raises(InputError, match=r"item_embeddings.npz: cannot be read as item embeddings"):
        read("vk-lsvd", *weeks, items, embedding)
    with pytest.raises(InputError, match=r"part.parquet: the name tells no week"):
        read("vk-lsvd", weeks[0].rename(tmp_path / "part.parquet"))


def test_scholar_inbox(tmp_path):
    rated, implicit = tmp_path / "rated_papers.csv", tmp_path / "implicit_interactions.csv"
    rated.write_text(
        "arxiv_id,user_id,rating,time\n"
        "2401.00001,3,-1,2024-01-02 08:00:00\n"
        "2401.10000,3,1,2024-01-02 08:00:01.250000\n"
        "2401.00003,3,1,\n"
    )
    implicit.write_text("arxiv_id,user_id,time\n2401.00001,4,2024-01-03 00:00:10\n")
    with pytest.raises(InputError, match=r"rated_papers.csv, line 4: time '' is no time"):
        read("scholar-inbox", rated)
    rows, items = read("scholar-inbox", rated, implicit, selection=Selection(skip_bad_rows=True))
    assert rows == [
        ("3", "2401.00001", DISLIKE, 1704182400, None),
        ("3", "2401.10000", LIKE, 1704182401, None),
        ("4", "2401.00001", EXPOSED, 1704240010, None),
    ]
    assert items is None


def test_piki(tmp_path):
    ratings = tmp_path / "piki_dataset.csv"
    ratings.write_text(
        "timestamp,user_id,song_id,liked,personalized,spotify_popularity,treatment_group\n"
        "2021-01-03 10:00:00,5,11,0,1,60,0\n"
        "2021-01-03 10:00:20,5,12,1,0,20,0\n"
        "2021-01-03 10:00:40,6,11,2,2,60,0\n"
    )
    rows, _ = read("piki", ratings)
    assert rows == [
        ("5", "11", DISLIKE, 1609668000, None),
        ("5", "12", LIKE, 1609668020, None),
        ("6", "11", LIKE, 1609668040, None),
    ]


def test_voteview(tmp_path):
    votes, calls = tmp_path / "HS117_votes.csv", tmp_path / "HS117_rollcalls.csv"
    votes.write_text(
        "congress,chamber,rollnumber,icpsr,cast_code,prob\n"
        "117,House,1,20301,1,99.0\n"
        "117,House,2,20301,6,100.0\n"
        "117,Senate,1,20301,9,100.0\n"
    )
    calls.write_text(
        "congress,chamber,rollnumber,date,session,clerk_rollnumber,yea_count,nay_count,bill_number,vote_result,"
        "vote_desc,vote_question,dtl_desc\n"
        '117,House,1,2021-01-03,1,2,1,0,,Passed,,Call by States,"A quorum, by states"\n'
        "117,House,2,2021-01-04,1,3,0,1,HRES5,Passed,Rules of the House,On Passage,\n"
        "117,Senate,1,2021-01-06,1,1,0,0,,Rejected,,On the Objection,\n"
    )
    rows, items = read("voteview", votes, calls)
    assert rows == [
        ("20301", "117-House-1", LIKE, 1609632000, None),
        ("20301", "117-House-2", DISLIKE, 1609718400, None),
        ("20301", "117-Senate-1", EXPOSED, 1609891200, None),
    ]
    assert items.text == [
        "Call by States: A quorum, by states",
        "On Passage: Rules of the House",
        "On the Objection",
    ]
    with pytest.raises(InputError, match="found no roll calls among the files"):
        read("voteview", votes)
    calls.write_text("".join(calls.read_text().splitlines(keepends=True)[:2]))
    with pytest.raises(InputError, match=r"HS117_votes.csv, line 3: no date"):
        read("voteview", votes, calls)

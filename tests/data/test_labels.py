from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ppl_seg.data.freesurfer import class_of_name, structures
from ppl_seg.data.labels import LabelTable, apply_map, composed, make_entry, merge_sides
from ppl_seg.data.tables import read_groups, read_table, read_value_map, table_for
from ppl_seg.errors import InputError


def write(tmp_path, text: str, encoding: str = "utf-8"):
    path = tmp_path / "labels.tsv"
    path.write_bytes(text.encode(encoding))
    return path


def test_background_is_first_and_added():
    table = LabelTable((make_entry(5, "B"), make_entry(3, "A"), make_entry(0, "Nothing")))
    assert table.indices.tolist() == [0, 5, 3] and table.names == ("Nothing", "B", "A")
    assert LabelTable((make_entry(5, "B"),)).names == ("Background", "B")
    assert table.class_names == ("background", "B", "A") and table.class_of_label == (0, 1, 2)


def test_the_fluid_around_a_brain_is_known_by_its_name():
    ventricle, fluid = make_entry(4, "Left-Lateral-Ventricle"), make_entry(24, "CSF")
    table = LabelTable((ventricle, fluid))
    assert table.outer_fluid == (2,) and table.class_names[table.fluid] == "csf"
    assert LabelTable((ventricle, make_entry(1, "Anterior"))).outer_fluid == ()
    assert LabelTable((make_entry(1, "Anterior"),)).fluid is None


def test_freesurfer_classes():
    assert class_of_name("Left-Hippocampus") == class_of_name("right-amygdala") == "hippocampus-amygdala"
    assert class_of_name("Hippocampus-Anterior") == class_of_name("Left-Hippocampus-CA1") == "hippocampus-amygdala"
    assert class_of_name("LEFT_CEREBRAL_CORTEX") == class_of_name("ctx-lh-insula") == "grey-matter"
    assert class_of_name("Left-Caudate") == class_of_name("Right-Accumbens-area") == "grey-matter"
    assert class_of_name("CC_Posterior") == class_of_name("Right-Cerebral-White-Matter") == "white-matter"
    assert class_of_name("Left-Thalamus-Proper") == "thalamus"
    assert class_of_name("Left-Cerebellum-Cortex") == class_of_name("Vermis") == "grey-matter"
    assert class_of_name("Right-Cerebellum-White-Matter") == "white-matter"
    assert class_of_name("Heart") is None and class_of_name("Accent") is None
    assert all(class_of_name(name) for value, (name, _) in structures().items() if value)
    ventricles = [4, 5, 14, 15, 24, 43, 44]
    assert {class_of_name(structures()[value][0]) for value in ventricles} == {"csf"}


def test_reading_a_tsv_with_bom_crlf_and_bids_columns(tmp_path):
    text = (
        "index\tname\tabbreviation\tcolor\tmapping\r\n0\tBackground\tBG\t#000000\t0\r\n"
        "17\tLeft-Hippocampus\tLH\t#0a0B0c\t1\r\n9\tHeart\tH\tn/a\t2\r\n"
    )
    table = read_table(write(tmp_path, text, "utf-8-sig"))
    assert table.indices.tolist() == [0, 17, 9]
    assert table.colors[1] == (10, 11, 12)
    assert table.class_names == ("background", "hippocampus-amygdala", "Heart")


def test_classes_of_the_table_win(tmp_path):
    table = read_table(
        write(tmp_path, "index\tname\tclass\n1\tLeft-Hippocampus\tx\n2\tB\tx\n3\tC\t\n4\tD\tbackground\n")
    )
    assert table.class_names == ("background", "x", "C") and table.class_of_label == (0, 1, 1, 2, 0)


def test_freesurfer_lut(tmp_path):
    table = read_table(
        write(tmp_path, "#No. Label Name: R G B A\n\n0 Unknown 0 0 0 0\n17  Left-Hippocampus  220 216 20 0\n")
    )
    assert table.names == ("Unknown", "Left-Hippocampus") and table.colors[1] == (220, 216, 20)
    with pytest.raises(InputError, match="line 2: expected 'number name R G B A'"):
        read_table(write(tmp_path, "0 Unknown 0 0 0 0\n17 Left Hippocampus 220 216 20 0\n"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("index\tlabel\n1\ta\n", "line 1: missing column name; .*found index, label"),
        ("index,name\n1,a\n", "missing column index, name"),
        ("index\tname\n1\ta\n\n2\tb\n1\ta\n", r"line 5: duplicate index 1 \(first on line 2\)"),
        ("index\tname\tclass\n1\ta\tx\n1\ta\ty\n", r"line 3: two classes \(x, y\) for index 1"),
        ("index\tname\n1.5\ta\n", "line 2: expected an integer as index, found '1.5'"),
        ("index\tname\n1\t\n", "line 2: the name of index 1 is empty"),
        ("index\tname\tcolor\n1\ta\tred\n", "line 2: expected a colour as #rrggbb, found 'red'"),
        ("index\tname\n1\ta\tb\n", "line 2: 3 cells for 2 columns"),
        ("index\tname\n1\ta\n9999999999\tb\n", "line 3: expected the index to fit 32 bits"),
        ("index\tname\n" + "9" * 5000 + "\tb\n", "line 2: expected the index to fit 32 bits, found 9{20}"),
        ("1 a 0 0 0 0\n2 b 0 256 0 0\n", "line 2: expected colours of 0 to 255, found 0 256 0"),
        ("1\thippocampus\n", "tables of another kind begin with a line that names the columns"),
    ],
)
def test_bad_tables(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(InputError, match=message) as caught:
        read_table(path)
    assert str(caught.value).startswith(str(path))
    with pytest.raises(InputError, match="missing.tsv: no such file"):
        read_table(tmp_path / "missing.tsv")
    (tmp_path / "annexed.tsv").symlink_to(".git/annex/objects/aa/bb/KEY/KEY")
    with pytest.raises(InputError, match="datalad get .*annexed.tsv"):
        read_table(tmp_path / "annexed.tsv")
    path.write_bytes(b"\xff\xfe\x00index")
    with pytest.raises(InputError, match="not a text file in UTF-8"):
        read_table(path)


def test_positions_and_back():
    table = LabelTable((make_entry(300, "B"), make_entry(7, "A")))
    data = np.array([[0, 300], [7, 7]])
    positions = table.to_positions(data)
    assert positions.tolist() == [[0, 1], [2, 2]] and positions.dtype == np.int64
    np.testing.assert_array_equal(table.from_positions(positions), data)
    with pytest.raises(InputError, match=r"x_dseg.nii: values 4, 9 are not in the label table \(0, 300, 7\)"):
        table.to_positions(np.array([0, 9, 4, 9]), "x_dseg.nii")


def test_table_for_without_a_file():
    table, _, messages = table_for([0, 2, 1])
    assert table.names == ("Background", "label-1", "label-2") and table.class_of_label == (0, 1, 2)
    assert "label-1, label-2" in messages[0]
    table, _, messages = table_for([2, 3, 4, 10, 41, 42, 43, 49, 0, 900])
    assert table.names[1] == "Left-Cerebral-White-Matter" and table.names[-1] == "label-900"
    assert table.class_of_label == (0, 1, 2, 3, 4, 1, 2, 3, 4, 5)
    assert "FreeSurfer" in messages[0] and "900" in messages[1]
    assert len({*table.colors}) > 4 and table.colors[4] == (0, 118, 14)
    table, _, _ = table_for([2, 3, 4, 10, 41, 42, 43, 900])  # seven of its values are not enough
    assert table.names[1] == "label-2"


def test_table_for_with_a_file(tmp_path):
    path = write(tmp_path, "index\tname\n0\tBG\n1\tA\n2\tB\n3\tC\n")
    table, _, messages = table_for([1, 3], path)
    assert table.names == ("BG", "A", "C") and messages == []
    with pytest.raises(InputError, match=r"labels.tsv: values 8 are not in the label table"):
        table_for([1, 8], path)


ASEG = [2, 3, 4, 10, 11, 12, 41, 42, 43]


def test_parcels_become_what_aseg_has(tmp_path):
    """aparc+aseg, aparc.a2009s+aseg and wmparc, with values that FreeSurfer's lookup table names."""
    cortex, white = [1000, 1035, 11101, 11175], [3001, 5001, 13175]
    right = {2030: 42, 12101: 42, 4030: 41, 5002: 41, 14101: 41}
    table, parcels, messages = table_for([*ASEG, *cortex, *white, *right, 251])
    assert parcels == dict.fromkeys(cortex, 3) | dict.fromkeys(white, 2) | right
    assert table.indices.tolist() == [0, *ASEG, 251]
    assert "12 cortical and white matter parcels" in messages[-1] and "become aseg's 2, 3, 41, 42" in messages[-1]
    # parcels alone name the whole; foreign values stay
    table, parcels, _ = table_for([4, 10, 11, 12, 43, 49, 1001, 2001, 3001, 4001, 7777])
    assert set(table.indices) == {0, 2, 3, 4, 10, 11, 12, 41, 42, 43, 49, 7777} and len(parcels) == 4
    # not FreeSurfer's: a table of few values, or one whose 3 is something else
    assert table_for([3, 1001])[1] == {}
    path = write(tmp_path, "index\tname\n3\tHeart\n1001\tAorta\n")
    assert table_for([3, 1001], path)[1] == {}
    with pytest.raises(InputError, match="values 1002 are not in the label table"):
        table_for([3, 1002], path)
    # a table that lists a parcel keeps it
    path = write(tmp_path, "index\tname\n3\tLeft-Cerebral-Cortex\n1001\tctx-lh-bankssts\n")
    table, parcels, _ = table_for([1001, 1002], path)
    assert parcels == {1002: 3} and table.indices.tolist() == [0, 3, 1001]


def test_maps_one_after_the_other():
    first, then = {1: 5, 2: 0}, {5: 7, 2: 9, 8: 7}
    data = np.array([0, 1, 2, 5, 8, 9])
    np.testing.assert_array_equal(apply_map(data, composed(first, then)), apply_map(apply_map(data, first), then))


def test_groups(tmp_path):
    path = write(tmp_path, "index\tgroup\r\n17\tHippocampus\r\n\r\n3\tCortex\r\n53\tHippocampus\r\n", "utf-8-sig")
    assert read_groups(path) == {"Hippocampus": (17, 53), "Cortex": (3,)}
    for text, message in (
        ("index\tgroup\n\n17\tA\n17\tB\n", "line 4: index 17 is in A and in B"),
        ("index\tname\n17\tA\n", "line 1: missing column group"),
        ("index\tgroup\nx\tA\n", "line 2: expected an integer as index"),
        ("index\tgroup\n1\t\n", "line 2: the group of index 1 is empty"),
    ):
        with pytest.raises(InputError, match=message):
            read_groups(write(tmp_path, text))


def test_maps(tmp_path):
    path = tmp_path / "map.tsv"
    path.write_text("from\tto\n1\t2\n2\t1\n5\t0\n")
    mapping = read_value_map(path)
    assert mapping == {1: 2, 2: 1, 5: 0}
    np.testing.assert_array_equal(apply_map(np.array([[0, 1, 2], [5, 7, 1]]), mapping), [[0, 2, 1], [0, 7, 2]])
    for text, message in (
        ("from\tto\n1\t2\n1\t3\n", "line 3: the value 1 is mapped twice"),
        ("a\tb\n", "missing column"),
        ("from\tto\n1\tx\n", "line 2: expected an integer as to"),
        ("", "missing column"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            read_value_map(path)


def test_merge_sides():
    names = {
        17: "Left-Hippocampus",
        53: "Right-Hippocampus",
        16: "Brain-Stem",
        60: "Right-Lesion",
        1: "Left-Thing",
        2: "Right-Thing",
    }
    table = LabelTable(tuple(make_entry(i, n) for i, n in names.items()))
    merged, mapping = merge_sides(table)
    assert mapping == {2: 1, 53: 17}
    assert merged.indices.tolist() == [0, 17, 16, 60, 1]
    assert merged.names == ("Background", "Hippocampus", "Brain-Stem", "Right-Lesion", "Thing")
    assert merged.class_names[-1] == "Thing" and merged.colors[1] == (220, 216, 20)
    assert set(apply_map(table.indices, mapping)) == set(merged.indices)


def test_sides_of_any_spelling_are_merged():
    names = {1: "ctx-lh-a", 2: "ctx-rh-a", 3: "left_hippocampus", 4: "right_hippocampus", 5: "Thalamus_R"}
    names |= {6: "Thalamus_L", 7: "Right Lesion", 8: "Left Lesion", 9: "Cleft"}
    merged, mapping = merge_sides(LabelTable(tuple(make_entry(i, n) for i, n in names.items())))
    assert mapping == {2: 1, 4: 3, 5: 6, 7: 8}
    assert merged.names == ("Background", "ctx-a", "hippocampus", "Thalamus", "Lesion", "Cleft")
    assert merged.class_names == ("background", "grey-matter", "hippocampus-amygdala", "thalamus", "Lesion", "Cleft")


def test_json_and_tsv(tmp_path):
    table, _, _ = table_for([2, 3, 4, 10, 41, 42, 43, 49, 900])
    assert LabelTable.from_dict(json.loads(json.dumps(table.to_dict()))) == table
    (tmp_path / "seg-ppl_dseg.tsv").write_text(table.to_tsv())
    lines = (tmp_path / "seg-ppl_dseg.tsv").read_text().splitlines()
    assert lines[0] == "index\tname\tcolor" and lines[5] == "10\tLeft-Thalamus\t#00760e"
    assert read_table(tmp_path / "seg-ppl_dseg.tsv").colors == table.colors
    assert [p.name for p in tmp_path.iterdir()] == ["seg-ppl_dseg.tsv"]


def test_two_labels_of_one_name_are_refused(tmp_path: Path) -> None:
    """Volumes and scores are told apart by names; of a table's other values nobody asks."""
    path = tmp_path / "labels.tsv"
    path.write_text("index\tname\n1\thippocampus\n2\thippocampus\n3\tother\n")
    with pytest.raises(InputError, match="labels.tsv: hippocampus is the name of 1 and of 2; rename one, or join them"):
        table_for([1, 2, 3], path)
    assert len(table_for([1, 3], path)[0]) == 3

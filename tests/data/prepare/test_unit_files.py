import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.data.prepare.unit_files import (
    concatenate,
    partition_of,
    read_section,
    unit_records,
    write_sections,
)

NUMBERS = st.integers(0, 2**64 - 1)
DOCUMENTS = st.lists(st.lists(st.tuples(NUMBERS, NUMBERS), max_size=4), max_size=6)


@settings(max_examples=40, deadline=None)
@given(documents=DOCUMENTS, n_partitions=st.integers(1, 9))
def test_each_unit_is_in_the_partition_of_its_key_in_the_order_of_the_documents(
    tmp_path_factory, documents, n_partitions
):
    path = tmp_path_factory.mktemp("units") / "keys"
    records = unit_records([np.array(d, np.uint64).reshape(-1, 2) for d in documents])
    write_sections(path, records, partition_of(records, n_partitions), n_partitions)
    expected = [
        (key, document, unit)
        for document, keys in enumerate(documents)
        for unit, key in enumerate(keys)
    ]
    found = []
    for partition in range(n_partitions):
        section = read_section(path, partition)
        rows = [(tuple(r["key"].tolist()), int(r["document"]), int(r["unit"])) for r in section]
        assert [row[1:] for row in rows] == sorted(row[1:] for row in rows)
        # Partition p has the keys from p/n to (p + 1)/n of all 2^64.
        assert all(key[0] * n_partitions >> 64 == partition for key, _, _ in rows)
        found += rows
    assert sorted(found, key=lambda row: row[1:]) == expected


def test_files_without_units_have_empty_sections(tmp_path):
    records = unit_records([np.empty((0, 3), np.uint64)])
    write_sections(tmp_path / "keys", records, partition_of(records, 4), 4)
    empty = [read_section(tmp_path / "keys", i) for i in range(4)]
    assert [len(section) for section in empty] == [0, 0, 0, 0]
    other = unit_records([np.ones((2, 3), np.uint64)])
    assert (concatenate([*empty, other]) == other).all()
    assert len(concatenate(empty)) == 0

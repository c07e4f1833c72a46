"""The metadata files of Orbax's checkpoint format (PyTree items, zarr 3, without OCDBT).

Orbax reads these checkpoints like its own; `tests/checkpoint/test_orbax_format.py` checks it. It
doesn't write them: it can't write `s3://`, and takes part on all hosts or on none.
"""

import json
from collections.abc import Mapping, Sequence

_HANDLER = "orbax.checkpoint.experimental.v1._src.handlers.pytree_handler.PyTreeHandler"
_DICT_KEY = 2  # Orbax's number for a key of a dict


def metadata_files(items: Mapping[str, Sequence[str]]) -> dict[str, bytes]:
    """Returns the metadata files of a checkpoint by relative name.

    Args:
        items: for each item ('model'), the dotted names of its arrays.
    """
    files = {f"{item}/_METADATA": _item_metadata(names) for item, names in items.items()}
    files["_CHECKPOINT_METADATA"] = {
        "item_handlers": dict.fromkeys(items, _HANDLER),
        "metrics": {},
        "performance_metrics": {},
        "init_timestamp_nsecs": 1,
        "commit_timestamp_nsecs": 1,  # the manifest commits; a time would make equal files differ
        "custom_metadata": {},
    }
    return {name: json.dumps(content).encode() for name, content in files.items()}


def _item_metadata(names: Sequence[str]) -> dict[str, object]:
    tree = {}
    for name in names:
        parts = tuple(name.split("."))
        tree[str(parts)] = {
            "key_metadata": [{"key": part, "key_type": _DICT_KEY} for part in parts],
            "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False},
        }
    return {
        "tree_metadata": tree,
        "use_ocdbt": False,
        "use_zarr3": True,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }

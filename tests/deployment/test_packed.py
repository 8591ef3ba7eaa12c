"""Tensors packed for the way, against the safetensors library and through their own inverse."""

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load

from fedsim.deployment.wire import PACKED, pack, unpack

arrays = st.dictionaries(st.text(max_size=12), st.lists(st.floats(width=32), max_size=9), min_size=1, max_size=5)


@given(arrays)
def test_packed_is_a_safetensors_file_and_comes_back_as_it_was(values):
    record = ArrayRecord({name: Array(np.array(v, np.float32)) for name, v in values.items()})
    packed = pack(RecordDict({"shared": record, "fedsim": ConfigRecord({"x": 1})}))
    file = load(packed["shared"][PACKED].data)
    assert [file[key].tobytes() for key in sorted(file)] == [a.data for a in record.values()]
    back = unpack(packed)
    assert list(back["shared"]) == list(record)
    assert all(back["shared"][n] == a for n, a in record.items())
    assert back["fedsim"] == packed["fedsim"]

import os
import pickle

import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from d2m_jax.config import ConfigError
from d2m_jax.data.sources.any_source import BadSample, Source
from d2m_jax.data.sources.array_records import features
from d2m_jax.data.sources.open import open_source
from tests.data.sources.making import encoded


def example_class():
    """tf.train.Example, of the definition in tensorflow/core/example."""
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="tensorflow")
    field = descriptor_pb2.FieldDescriptorProto

    def message(name, *fields):
        made = file.message_type.add(name=name)
        for number, (label, of, kind) in enumerate(fields, 1):
            repeated = label == "repeated"
            packed = repeated and kind in (field.TYPE_FLOAT, field.TYPE_INT64)
            one = made.field.add(
                name=of[0],
                number=number,
                type=kind,
                label=field.LABEL_REPEATED if repeated else field.LABEL_OPTIONAL,
            )
            if len(of) > 1:
                one.type_name = f".tensorflow.{of[1]}"
            if packed:
                one.options.packed = True
        return made

    held = field.TYPE_MESSAGE
    message("BytesList", ("repeated", ["value"], field.TYPE_BYTES))
    message("FloatList", ("repeated", ["value"], field.TYPE_FLOAT))
    message("Int64List", ("repeated", ["value"], field.TYPE_INT64))
    message(
        "Feature",
        ("optional", ["bytes_list", "BytesList"], held),
        ("optional", ["float_list", "FloatList"], held),
        ("optional", ["int64_list", "Int64List"], held),
    )
    made = message("Features", ("repeated", ["feature", "Features.FeatureEntry"], held))
    entry = made.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, type=field.TYPE_STRING, label=1)
    entry.field.add(name="value", number=2, type=held, label=1, type_name=".tensorflow.Feature")
    message("Example", ("optional", ["features", "Features"], held))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("tensorflow.Example"))


Example = example_class()


def record(**of):
    made = Example()
    for name, value in of.items():
        feature = made.features.feature[name.replace("__", "/")]
        if isinstance(value, list) and value and isinstance(value[0], int):
            feature.int64_list.value.extend(value)
        elif isinstance(value, list) and value and isinstance(value[0], float):
            feature.float_list.value.extend(value)
        else:
            feature.bytes_list.value.extend(value if isinstance(value, list) else [value])
    return made.SerializeToString()


def write(path, records, group=1):
    writer = ArrayRecordWriter(str(path), f"group_size:{group}")
    for one in records:
        writer.write(one)
    writer.close()
    return path


def samples(count):
    return [
        record(image=encoded(i, size=(20 + i, 10)), caption=b"caption %d" % i) for i in range(count)
    ]


@pytest.mark.parametrize("group", [1, 4])
def test_records(tmp_path, group):
    write(tmp_path / "train-0.array_record", samples(150), group)
    write(tmp_path / "train-1.arrayrecord", samples(2), group)
    source = open_source(str(tmp_path))
    assert isinstance(source, Source) and len(source) == 152
    for i in (151, 0, 149, 150, 77):
        sample, number = source[i], i % 150
        assert sample.image == encoded(number, size=(20 + number, 10))
        assert sample.captions == (f"caption {number}",)
        assert source.sizes()[i].tolist() == [10, 20 + number]
        assert sample.key == source.key(i)
    assert source.key(151) == "train-1.arrayrecord: 1"
    assert pickle.loads(pickle.dumps(source))[77] == source[77]


def test_features_as_protocol_buffers_say():
    made = record(image=b"x" * 300, text=[b"a", b"b"], label=[1, -7, 2**40], score=[0.5], empty=[])
    assert features(made) == {
        "image": [b"x" * 300],
        "text": [b"a", b"b"],
        "label": [],
        "score": [],
        "empty": [],
    }
    assert features(b"") == {}


def test_names_of_tfds(tmp_path):
    write(
        tmp_path / "a.array_record",
        [record(image__encoded=encoded(), captions=[b"one", b"two"], label=[3])],
    )
    source = open_source(str(tmp_path))
    assert source[0].image == encoded() and source[0].captions == ("one", "two")


def test_bad_records(tmp_path):
    bad = [
        record(label=[1]),
        b"no example",
        record(image=b""),
        record(image=encoded(), text=b"\xff"),
        record(image=encoded(), text=b"x" * 70_000),
    ]
    path = write(tmp_path / "a.array_record", [*samples(1), *bad])
    with pytest.raises(ConfigError, match="3 samples cannot be used, more than max_bad = 2"):
        open_source(str(tmp_path), max_bad=2)
    source = open_source(str(tmp_path))
    assert [source.key(i) for i in range(len(source))] == [
        f"a.array_record: {i}" for i in (0, 4, 5)
    ]
    told = " ".join(source.index.parts[0].problems)
    assert f"{path}: 1: has the features label; expected an encoded image" in told
    assert f"{path}: 2: is no tf.train.Example" in told
    with pytest.raises(BadSample, match="^a.array_record: 4: its caption is no UTF-8"):
        source[1]
    with pytest.raises(BadSample, match="^a.array_record: 5: its caption has 70000 bytes"):
        source[2]


def test_any_cut_of_a_record_is_refused_or_shorter():
    whole = record(image=encoded(), text=b"a")
    for end in range(1, len(whole)):
        try:
            assert features(whole[:end]) == features(whole)
        except ValueError as error:
            assert "is no tf.train.Example" in str(error)


def test_damaged_files(tmp_path):
    path = write(tmp_path / "a.array_record", samples(3))
    write(tmp_path / "b.array_record", samples(1))
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(
        ConfigError,
        match=f"1 samples cannot be used.*{path}: is no ArrayRecord file, or is cut off",
    ):
        open_source(str(tmp_path), max_bad=0)
    assert len(open_source(str(tmp_path))) == 1


def test_changed_while_it_is_read(tmp_path):
    path = write(tmp_path / "a.array_record", samples(3))
    source = open_source(str(tmp_path))
    write(path, samples(4))
    with pytest.raises(BadSample, match="^a.array_record: 1: .*has changed since it was indexed"):
        source[1]


def test_a_damaged_record_costs_itself(tmp_path):
    path = write(tmp_path / "a.array_record", samples(30))
    whole = path.read_bytes()
    at = whole.index(encoded(7, size=(27, 10))[-40:])
    path.write_bytes(whole[:at] + b"\xff" * 20 + whole[at + 20 :])
    with pytest.raises(ConfigError, match=f"1 samples cannot be used.*{path}: 7: .*Corrupted"):
        open_source(str(tmp_path), max_bad=0)
    source = open_source(str(tmp_path))
    assert [source[i].captions[0] for i in range(29)] == [
        f"caption {i}" for i in range(30) if i != 7
    ]

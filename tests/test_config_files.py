"""Configuration files: their names, what extends what, what is refused and how it is said, and where values come from."""

import re

import pytest

from base.config import COUNTS, LARGEST_FILE, RECIPES, parse_value, resolve
from base.errors import UserError
from base.records import config_text


@pytest.mark.parametrize(
    "name, counts",
    [
        ("V100x2x8", ("2", "8")),
        ("CPUx1x1", ("1", "1")),
        ("BI_V100x1x16", ("1", "16")),
        ("DGX2_multi_4x16x24", ("4", "16")),
        ("DGXA100_multi_2x8x56", ("2", "8")),
        ("DGX1_32", None),
        ("DGX1_multinode", None),
        ("x1x8", None),
    ],
)
def test_names_that_count_nodes_and_devices(name, counts):
    found = COUNTS.fullmatch(name)
    assert (found and (found["nodes"], found["devices"])) == counts


def test_a_name_is_held_to_its_nodes_and_devices(config_folder):
    here = config_folder(V100x2x8="nodes: 2\ndevices: 8", V100x1x8="extends: V100x2x8", A_multi_4x16x24="nodes: 16\ndevices: 24")
    assert resolve(here, "V100x2x8").config.world_size == 16
    assert resolve(here, "V100x2x8", {"devices": 4}).config.devices == 4  # a flag may
    with pytest.raises(UserError, match=r"V100x1x8\.yaml says nodes 2, devices 8, but its name says 1, 8"):
        resolve(here, "V100x1x8")
    with pytest.raises(UserError, match="its name says 4, 16"):
        resolve(here, "A_multi_4x16x24")


REFUSED = {  # file → what the message must say beside the file's name
    "batchsize: 2": "unknown key 'batchsize'; did you mean 'batch_size'",
    "zzz: 2": "unknown key 'zzz'; the keys are nodes, devices",
    "epochs: many": "epochs is 'many'",
    "epochs: 2.5": "epochs is 2.5",
    "epochs: '2'": "epochs is '2'",
    "seed: true": "seed is True",
    "seed: 010": "seed is '010'",
    "seed: 1:30": "seed is '1:30'",
    f"seed: {1 << 63}": "seed is 9223372036854775808",
    "nodes: 0": "nodes is 0",
    "target: 1.5": "target is 1.5",
    "target: .nan": "target is nan",
    "learning_rate: .inf": "learning_rate is inf",
    "learning_rate: -1e-3": "learning_rate is -0.001",
    "warmup_factor: 1000000": "warmup_factor is 1000000",
    "skip_bad_images: no": "skip_bad_images is 'no'",
    "backbone: resnet99": "backbone is 'resnet99'",
    "device: cpu:0": "device is 'cpu:0'",
    "image_size: 300": "image_size is 300: input should be a list",
    "image_size: [300]": "image_size is [300]: 2 values are needed",
    "image_size: [300, 300, 3]": "image_size is [300, 300, 3]: 2 values are needed",
    "strides: [1, 1, 2, 2, 2, 0]": "strides is 0",
    "use: [loss]": "use is ['loss']: input should be a mapping",
    "use: {loss: 3}": "use is 3",
    "decay_epochs: [50, 40]": "decay_epochs [50, 40] must rise",
    "warmup_epochs: 1\nwarmup_steps: 2": "warmup_epochs 1.0 and warmup_steps 2 are both set",
    "batch_size: 3\ngradient_accumulation: 2": "batch_size 3 cannot be divided into gradient_accumulation 2",
    "train_images: ../elsewhere": "train_images '../elsewhere' must lie within data_dir",
    "val_annotations: /etc/passwd": "val_annotations '/etc/passwd' must lie within data_dir",
    "extends: nope": "extends the unknown configuration 'nope'",
    "extends: demoo": "did you mean demo?",
    "extends: ../x": "'../x' is not a configuration's name",
    "extends: x": "extends the unknown configuration 'x'",
    "extends: ''": "'' is not a configuration's name",
    "extends: [demo]": "['demo'] is not a configuration's name",
    "seed: 1\nseed: 2": "key 'seed' stands twice",
    "use: {loss: a, loss: b}": "key 'loss' stands twice",
    "seed: &one 1\nepochs: *one": "aliases are not allowed",
    "<<: {seed: 2}": "unknown key '<<'",
    "seed: !!int x": "not readable as YAML",
    "seed: !!bool x": "not readable as YAML",
    "seed: !!timestamp x": "not readable as YAML",
    f"seed: {'9' * 5000}": "not readable as YAML",
    "? [1, 2]\n: 3": "not readable as YAML",
    "1: 2": "key 1 is not a name",
    "seed: 1\n---\nseed: 2": "not readable as YAML",
    "seed: [": "not readable as YAML",
    "[" * 20000: "not readable as YAML",
    "- seed": "must hold `key: value` lines, and holds list",
    "seed": "must hold `key: value` lines, and holds str",
    b"\x00\x01\x02\xff": "not readable as YAML",
    b"seed: \xff\xfe": "not readable as YAML",
    "# " + "x" * LARGEST_FILE: "too many for a configuration",
}


@pytest.mark.parametrize("text", REFUSED, ids=lambda text: repr(text[:30]))
def test_refusals_name_file_and_key(config_folder, text):
    here = config_folder(x=text)
    with pytest.raises(UserError) as caught:
        resolve(here, "x")
    assert REFUSED[text] in str(caught.value) and str(here / "config" / "x.yaml") in str(caught.value)


def test_python_tags_are_not_executed(config_folder, tmp_path):
    marker = tmp_path / "executed"
    for tag in (f"!!python/object/apply:os.system ['touch {marker}']", f"!!python/object/new:os.mkdir ['{marker}']", "!!python/name:os.system"):
        with pytest.raises(UserError, match=r"x\.yaml: not readable as YAML: could not determine a constructor"):
            resolve(config_folder(x=f"seed: {tag}"), "x")
    assert not marker.exists()


def test_several_problems_are_told_at_once(config_folder):
    with pytest.raises(UserError) as caught:
        resolve(config_folder(x="epochs: many\nbatchsize: 3"), "x", {"seed": -1})
    lines = sorted(str(caught.value).splitlines())
    assert len(lines) == 3
    for said in ("epochs is 'many'", "unknown key 'batchsize'", "--seed: seed is -1"):
        assert sum(said in line for line in lines) == 1


def test_impossible_combination_names_where_each_part_comes_from(config_folder):
    here = config_folder(x="warmup_steps: 5")
    with pytest.raises(UserError) as caught:
        resolve(here, "x", {"warmup_epochs": 1.0})
    assert f"warmup_steps from {here / 'config' / 'x.yaml'}" in str(caught.value) and "warmup_epochs from --warmup_epochs" in str(caught.value)


@pytest.mark.parametrize("name", ["../demo", "/etc/passwd", "a/b", "..", ".hidden", "", "a\0b", "a\n"])
def test_names_cannot_leave_the_folder(config_folder, name):
    with pytest.raises(UserError, match="is not a configuration's name"):
        resolve(config_folder(), name)


def test_unknown_configuration_names_the_nearest(config_folder):
    with pytest.raises(UserError, match=r"no configuration 'demoo'; did you mean demo\?"):
        resolve(config_folder(), "demoo")


def test_rings_of_extends_are_refused(config_folder):
    here = config_folder(a="extends: b", b="extends: c", c="extends: a")
    with pytest.raises(UserError, match="ring: a → b → c → a"):
        resolve(here, "a")


def test_a_file_may_extend_its_namesake_among_the_recipes(config_folder):
    resolved = resolve(config_folder(demo="extends: demo\nbatch_size: 4"), "demo")
    assert resolved.config.batch_size == 4 and resolved.config.image_size == (128, 128)
    assert resolved.sources["image_size"] == str(RECIPES / "demo.yaml")


def test_sources_say_which_file_or_flag_set_a_value(config_folder):
    here = config_folder(parent="seed: 2\nepochs: 3\nworkers: 1", child="extends: parent\nepochs: 4")
    resolved = resolve(here, "child", {"workers": 0})
    parent, child = here / "config" / "parent.yaml", here / "config" / "child.yaml"
    assert dict(resolved.sources) == {"seed": str(parent), "epochs": str(child), "workers": "--workers"}
    assert (resolved.config.seed, resolved.config.epochs, resolved.config.workers) == (2, 4, 0)
    text = config_text(resolved, "mine")
    for key, source in {"seed": str(parent), "workers": "--workers", "momentum": "default"}.items():
        assert re.search(rf"^{key}: .*  # {re.escape(source)}$", text, re.MULTILINE), text


def test_plain_scalars_are_read_as_yaml_1_2():
    numbers = {"1e-3": 1e-3, "1E3": 1e3, "2.5e-3": 2.5e-3, "-3": -3, "0": 0, ".5": 0.5, "5.": 5.0}
    assert {text: parse_value(text) for text in numbers} == numbers
    assert all(isinstance(parse_value(text), type(value)) for text, value in numbers.items())
    texts = ["no", "on", "y", "010", "1_000", "1:30", "2020-01-01", "2020-13-45", "0x1f", "1e", "e5", "a: b: c", "*x", "[1", "!!int x"]
    assert [parse_value(text) for text in texts] == texts
    assert [parse_value(text) for text in ("null", "~", "", "true", "False")] == [None, None, None, True, False]

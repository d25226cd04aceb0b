"""Configurations: the published recipes, flags, and reading back what was written."""

import string

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from base.backend import backend_folder, list_backends
from base.config import COUNTS, Config, Resolved, list_configs, meanings, read_run, resolve, validate
from base.errors import UserError
from base.records import config_text
from base.schedule import scaled_rate, warmup_steps
from base.tools.launch import flag_value, parse

SHIPPED = sorted({(name, config) for name in list_backends() for config in list_configs(backend_folder(name))})
TRAIN_IMAGES = 117_266  # of train2017 with boxes

# Recipes as published: nodes, devices, batch a device, rate after scaling, weight decay, warm-up steps on COCO, decay epochs, epochs
PUBLISHED = {
    ("reference", "DGX1_32"): (1, 1, 32, 2.5e-3, 5e-4, 0, (40, 50), 70),
    ("reference", "DGX1_singlenode"): (1, 8, 128, 0.08, 5e-4, 300, (40, 50), 70),
    ("reference", "DGX1_multinode"): (2, 8, 64, 0.08, 5e-4, 300, (40, 50), 70),
    ("reference", "CPUx1x1"): (1, 1, 32, 2.5e-3, 5e-4, 0, (40, 50), 70),
}


@pytest.mark.parametrize("backend_name, config", SHIPPED)
def test_every_shipped_configuration_resolves(backend_name, config):
    resolved = resolve(backend_folder(backend_name), config)
    assert resolved.sources.keys() <= Config.model_fields.keys()
    if counts := COUNTS.fullmatch(config):
        assert (resolved.config.nodes, resolved.config.devices) == (int(counts["nodes"]), int(counts["devices"]))
    if config == "demo":  # whose log MLPerf's compliance checker reads: it wants the rate to fall at tenths of epochs 40 and 50
        tenths = [epoch * 10 / usual for epoch, usual in zip(resolved.config.decay_epochs, (40, 50), strict=True)]
        assert tenths[0] == tenths[1] and tenths[0].is_integer()


@pytest.mark.parametrize("backend_name, config", PUBLISHED)
def test_recipes_are_as_published(backend_name, config):
    c = resolve(backend_folder(backend_name), config).config
    rate, warmup = scaled_rate(c), warmup_steps(c, TRAIN_IMAGES)
    got = (c.nodes, c.devices, c.batch_size, pytest.approx(rate, rel=1e-12), c.weight_decay, warmup, c.decay_epochs, c.epochs)
    assert got == PUBLISHED[backend_name, config]
    assert (c.momentum, c.score_threshold, c.iou_threshold, c.max_detections, c.eval_every) == (0.9, 0.05, 0.5, 200, 5)
    assert (c.image_size, c.strides, c.backbone, c.decay_factor, c.target) == ((300, 300), (1, 1, 2, 2, 2, 1), "resnet34", 0.1, 0.23)
    assert c.learning_rate == 2.5e-3 and c.learning_rate_scaling == "linear"
    assert c.warmup_epochs == (2.619685 if warmup else None) and c.warmup_factor == 0


# Flags

A_VALUE = {  # for each key: the flag's words, and the value that must reach the configuration
    "nodes": (["2"], 2),
    "devices": (["3"], 3),
    "device": (["cpu"], "cpu"),
    "use": (["loss=reference", "loader=reference"], {"loss": "reference", "loader": "reference"}),
    "timeout": (["60"], 60),
    "walltime": (["90"], 90),
    "max_restarts": (["3"], 3),
    "norm_ranks": (["0"], 0),
    "gradient_bucket_mb": (["25"], 25),
    "gradient_compression": (["bf16"], "bf16"),
    "bind_cores": (["false"], False),
    "device_ids": (["0"], (0,)),
    "checkpoint": (["runs/first"], "runs/first"),
    "stages": (["{epochs: 3}", "{epochs: 4}"], ({"epochs": 3}, {"epochs": 4})),
    "backbone": (["resnet50"], "resnet50"),
    "backbone_path": (["1e-3"], "1e-3"),
    "image_size": (["96", "128"], (96, 128)),
    "strides": (list("312222"), (3, 1, 2, 2, 2, 2)),
    "data_dir": (["/a b/c#d"], "/a b/c#d"),
    "train_images": (["train"], "train"),
    "train_annotations": (["t.json"], "t.json"),
    "val_images": (["010"], "010"),
    "val_annotations": (["v.json"], "v.json"),
    "workers": (["0"], 0),
    "max_samples": (["50"], 50),
    "skip_bad_images": (["true"], True),
    "evaluate_in_background": (["true"], True),
    "seed": (["7"], 7),
    "trials": (["5"], 5),
    "tensorboard": (["true"], True),
    "report": (["false"], False),
    "epochs": (["5"], 5),
    "max_steps": (["9"], 9),
    "batch_size": (["8"], 8),
    "gradient_accumulation": (["2"], 2),
    "learning_rate": (["1e-3"], 1e-3),
    "learning_rate_scaling": (["whole"], "whole"),
    "warmup_epochs": (["2"], 2.0),
    "warmup_steps": (["650"], 650),
    "warmup_factor": (["3"], 3),
    "decay_epochs": (["44", "55"], (44, 55)),
    "decay_factor": ([".5"], 0.5),
    "momentum": (["0"], 0.0),
    "weight_decay": (["1.6e-4"], 1.6e-4),
    "target": (["null"], None),
    "eval_every": (["0"], 0),
    "eval_epochs": (["40", "50", "55"], (40, 50, 55)),
    "eval_batch_size": (["160"], 160),
    "score_threshold": (["0.1"], 0.1),
    "iou_threshold": (["1"], 1.0),
    "max_detections": (["100"], 100),
    "runs_dir": (["null-island"], "null-island"),
    "log_every": (["1"], 1),
    "telemetry_seconds": (["0.5"], 0.5),
    "checkpoint_every": (["100"], 100),
    "keep_checkpoints": (["1"], 1),
}


@pytest.mark.parametrize("key", Config.model_fields)
def test_every_key_is_a_flag_in_both_spellings_and_reaches_the_configuration(config_folder, key):
    words, value = A_VALUE[key]
    assert getattr(Config(), key) != value
    spellings = [[f"--{key}", *words], [f"--{key.replace('_', '-')}", *words]]
    if len(words) == 1:
        spellings += [[f"--{key}={words[0]}"], [f"--{key.replace('_', '-')}={words[0]}"]]
    elif key != "use":
        spellings += [[f"--{key}=[{', '.join(words)}]"]]
    for spelled in spellings:
        _, overrides = parse(spelled)
        resolved = resolve(config_folder(x=""), "x", overrides)
        assert getattr(resolved.config, key) == value and type(getattr(resolved.config, key)) is type(value)
        assert resolved.sources == {key: f"--{key}"}
        assert [k for k in Config.model_fields if getattr(resolved.config, k) != getattr(Config(), k)] == [key]


COMMANDS = {  # commands of the READMEs that this benchmark follows → what they set
    "--name iluvatar --config V100x1x8 --data_dir D --backbone_path F.pth": {"data_dir": "D", "backbone_path": "F.pth"},
    "--pretrained-backbone F.pth": {"backbone_path": "F.pth"},
    "--device-ids 0 1 2 3 --strides 2 2 2 2 1 1 --batch-size 32 --image-size 800 1200 --sync-bn": {
        "device_ids": [0, 1, 2, 3], "strides": [2, 2, 2, 2, 1, 1], "batch_size": 32, "image_size": [800, 1200], "norm_ranks": 0,
    },
    "--device-ids 0 --image-size 700 700 --save-path models/models_700 --checkpoint ./models_300/iter_24000": {
        "device_ids": [0], "image_size": [700, 700], "runs_dir": "models", "checkpoint": "./models_300/iter_24000",
    },
}  # fmt: skip


@pytest.mark.parametrize("line", COMMANDS)
@pytest.mark.parametrize(("off", "on"), ["-_", "_-"])
def test_published_commands_in_both_spellings(line, off, on):
    flags, overrides = parse([f"--{word[2:].replace(off, on)}" if word.startswith("--") else word for word in line.split()])
    assert overrides == COMMANDS[line]
    assert (flags.name, flags.config) == (("iluvatar", "V100x1x8") if "--name" in line else (None, None))
    assert flags.run_name == ("models_700" if "models/" in line else None)


def test_flags_of_every_kind():
    assert parse(["--skip-bad-images"])[1] == {"skip_bad_images": True}
    assert parse(["--skip_bad_images", "false"])[1] == {"skip_bad_images": False}
    assert parse(["--decay_epochs"])[1] == {"decay_epochs": []}
    assert parse(["--nproc", "4", "--nnodes=2", "--pretrained-backbone", "f.pth"])[1] == {"devices": 4, "nodes": 2, "backbone_path": "f.pth"}
    assert parse(["--warmup_steps", "null", "--backbone_path", "null"])[1] == {"warmup_steps": None, "backbone_path": None}
    assert parse(["--use=loss=reference"])[1] == {"use": {"loss": "reference"}}
    flags, overrides = parse(["--run-name", "a-b_c", "--config", "a-b", "--dry-run", "--name=x-y"])
    assert (flags.run_name, flags.config, flags.name, flags.dry_run, overrides) == ("a-b_c", "a-b", "x-y", True, {})
    with pytest.raises(UserError, match="use 'loss' is not COMPONENT=BACKEND"):
        flag_value("use", ["loss"])


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--batchsize", "3"], "'--batchsize'; did you mean --batch_size"),
        (["--eval-evry=3"], "did you mean --eval_every"),
        (["--qqqqqqqq"], "'--qqqqqqqq'; --help"),
        (["stray"], "unknown argument 'stray'"),
        (["--seed"], "--seed: expected one argument"),
        (["--epoch", "3"], "did you mean --epochs"),
        (["--node_rank", "first"], "--node_rank: invalid int value: 'first'"),
    ],
)
def test_wrong_flags_name_the_nearest(arguments, said):
    with pytest.raises(UserError) as caught:
        parse(arguments)
    assert said in str(caught.value)


def test_help_gives_each_key_its_meaning_and_default():
    assert meanings().keys() == Config.model_fields.keys()  # the schema comments every key


# Reading back what a run's folder keeps

TEXT = st.text(st.characters(codec="utf-8"), max_size=30)
LIKELY = st.sampled_from(
    ["1e-3", "null", "true", "010", "~", "", " ", "a # b", "#", "'", '"', "a: b", "- a", "a\nb", "\n", "[x]", "{a", "&a", "*a", "\u2028", "\t", "-"]
)
PATHS = st.one_of(LIKELY, TEXT)
INSIDE = PATHS.filter(lambda text: not text.startswith("/") and ".." not in text.split("/"))
COUNT = st.integers(1, 10**12)
RATE = st.floats(0, 1e300, allow_nan=False)
SHARE = st.floats(0, 1)
RISING = st.lists(st.integers(1, 500), unique=True, max_size=5).map(lambda values: tuple(sorted(values)))


@st.composite
def configs(draw):
    """Any valid configuration."""
    parts, warmup = draw(st.integers(1, 50)), draw(st.sampled_from(["warmup_epochs", "warmup_steps", None]))
    named = {
        "device": st.text(string.ascii_lowercase, min_size=1, max_size=9),
        "use": st.dictionaries(PATHS, PATHS, max_size=4),
        "backbone": st.sampled_from(["resnet18", "resnet34", "resnet50"]),
        "learning_rate_scaling": st.sampled_from(["linear", "whole", "none"]),
        "image_size": st.tuples(COUNT, COUNT),
        "strides": st.tuples(*[COUNT] * 6),
        "batch_size": st.integers(1, 100).map(lambda n: n * parts),
        "gradient_accumulation": st.just(parts),
        "max_steps": st.none() | COUNT,
        "target": st.none() | SHARE,
        "norm_ranks": st.integers(0, 1),
        "device_ids": st.just(()),
        "checkpoint": st.none(),
        "trials": st.just(1),
        "stages": st.sampled_from([(), ({"image_size": [96, 96]}, {"epochs": 2, "target": None})]),
        "gradient_compression": st.sampled_from(["none", "bf16", "fp16"]),
        **dict.fromkeys(("skip_bad_images", "evaluate_in_background", "bind_cores", "tensorboard", "report"), st.booleans()),
        "seed": st.integers(0, (1 << 63) - 1),
        "warmup_factor": st.integers(0, 32),
        "warmup_epochs": RATE if warmup == "warmup_epochs" else st.none(),
        "warmup_steps": st.integers(0, 10**6) if warmup == "warmup_steps" else st.none(),
        **dict.fromkeys(("backbone_path", "data_dir"), st.none() | PATHS),
        **dict.fromkeys(("train_images", "train_annotations", "val_images", "val_annotations"), INSIDE),
        **dict.fromkeys(("decay_epochs", "eval_epochs"), RISING),
        **dict.fromkeys(("learning_rate", "weight_decay", "telemetry_seconds"), RATE),
        **dict.fromkeys(("decay_factor", "momentum", "score_threshold", "iou_threshold"), SHARE),
        "runs_dir": PATHS,
    }
    return Config(**{key: draw(named.get(key, COUNT)) for key in Config.model_fields})


@settings(max_examples=60, deadline=None)
@example(Config(data_dir="1e-3"), {})
@example(Config(data_dir="two\nlines"), {"data_dir": "--data_dir"})
@given(configs(), st.dictionaries(st.sampled_from(list(Config.model_fields)), st.sampled_from(["--x", "/a/b.yaml", "reference/config/x.yaml"])))
def test_a_written_configuration_is_read_back(tmp_path_factory, config, sources):
    file = tmp_path_factory.mktemp("run") / "config.yaml"
    file.write_text(config_text(Resolved(config, sources), "reference"), encoding="utf-8")
    again = read_run(file)
    assert again == config
    assert [type(getattr(again, key)) for key in Config.model_fields] == [type(getattr(config, key)) for key in Config.model_fields]


@settings(max_examples=60, deadline=None)
@given(configs())
def test_a_configuration_survives_json_as_the_ranks_get_it(config):
    assert validate(config.model_dump(mode="json"), {}) == config


@settings(max_examples=150, deadline=None)
@given(st.one_of(st.binary(max_size=80), st.tuples(st.sampled_from(list(Config.model_fields)), TEXT).map(": ".join).map(str.encode)))
def test_any_file_is_read_or_refused(tmp_path_factory, data):
    file = tmp_path_factory.mktemp("any") / "x.yaml"
    file.write_bytes(data)
    try:
        assert isinstance(read_run(file), Config)
    except UserError as error:
        assert str(error)

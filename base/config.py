"""The configuration of a run: one schema, with every default and its unit, and where each value comes from.

A configuration file is YAML 1.2 with a few of the schema's keys and ``extends:`` for its parent. It is data: read by a
safe loader without aliases, never executed. Files are looked up as ``<backend>/config/<name>.yaml``, then ``base/recipes/<name>.yaml``.
"""

import difflib
import inspect
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from base.backends import backend_folder, list_backends
from base.errors import UserError
from data_sets.layout import COCO_2017, find

RECIPES = Path(__file__).parent / "recipes"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
# <accelerator>x<nodes>x<devices per node>, or as MLPerf submissions have it: <system>_<nodes>x<devices>x<batch>
COUNTS = re.compile(r"(?:.*_|.*?[a-zA-Z0-9]x)(?P<nodes>\d+)x(?P<devices>\d+)(?:x\d+)?")
LARGEST_FILE = 1 << 16  # bytes

Count = Annotated[int, Field(ge=1)]
NotNegative = Annotated[int, Field(ge=0)]
Name = Annotated[str, Field(pattern="^[a-z]+$")]
Seed = Annotated[int, Field(ge=0, lt=1 << 63)]
Power = Annotated[int, Field(ge=0, le=32)]
Share = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Config(BaseModel):
    """Everything that decides what a run does. Frozen; unknown keys and wrong types are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    # Where it runs
    nodes: Count = 1  # machines
    devices: Count = 1  # devices, and so processes, on each machine
    device_ids: tuple[NotNegative, ...] = ()  # which devices of a machine its ranks take; none: the first ones
    device: Name = "auto"  # torch device type; auto: what the backend asks for, by default the accelerator if there is one
    use: dict[str, str] = {}  # components from another backend, such as loader=reference
    timeout: Count = 1800  # seconds without progress after which a rank is ended, and the run with it
    max_restarts: NotNegative = 0  # times that a run which lost a rank starts again by itself, from its latest checkpoint
    norm_ranks: NotNegative = 1  # ranks in a row whose batches share the statistics of batch norm; 0: all of them
    gradient_bucket_mb: NotNegative = 0  # MiB of gradients averaged as soon as they are there; 0: all, after the backward pass
    gradient_compression: Literal["none", "bf16", "fp16"] = "none"  # how gradients travel between ranks
    walltime: Count = 1440  # minutes that a batch system gives one trial; what is not done by then is saved, and the next job goes on with it
    bind_cores: bool = True  # a rank stays on the CPU cores beside its device, where torch can tell them

    # Model
    backbone: Literal["resnet18", "resnet34", "resnet50"] = "resnet34"  # a ResNet of torchvision
    backbone_path: str | None = None  # torchvision weights of the backbone; null: random initial weights
    checkpoint: str | None = None  # weights to begin with, of any image size, strides or classes: a file, or a run's folder
    image_size: tuple[Count, Count] = (300, 300)  # pixels: height, width, of any ratio, up to 8192
    strides: tuple[Count, Count, Count, Count, Count, Count] = (1, 1, 2, 2, 2, 1)  # of offset heads, class heads and four blocks

    # Data
    data_dir: str | None = None  # folder of the data set; of the next four, what is not stated is found in it: data_sets/layout.py
    train_images: str = COCO_2017["train_images"]  # folder, relative to data_dir
    train_annotations: str = COCO_2017["train_annotations"]  # COCO's JSON or a list of Pascal VOC, relative to data_dir
    val_images: str = COCO_2017["val_images"]  # folder, relative to data_dir
    val_annotations: str = COCO_2017["val_annotations"]  # COCO's JSON or a list of Pascal VOC, relative to data_dir
    workers: NotNegative = 4  # loader processes of each rank; 0: in the rank itself
    max_samples: Count = 1  # tries of each crop rule (MLPerf allows 1 or 50)
    skip_bad_images: bool = False  # go on without images that cannot be read, up to 1 % of them

    # Recipe
    seed: Seed = 1  # of initial weights, order and augmentation
    epochs: Count = 70  # passes over the training images at most
    max_steps: Count | None = None  # end after so many steps, whatever the epochs
    batch_size: Count = 32  # images a device and step
    gradient_accumulation: Count = 1  # parts in which a device computes its batch
    learning_rate: Rate = 2.5e-3  # before scaling
    learning_rate_scaling: Literal["linear", "whole", "none"] = "linear"  # rule for the global batch: base/schedule.py
    warmup_epochs: Rate | None = None  # length of the warm-up, in epochs; null: see warmup_steps
    warmup_steps: NotNegative | None = None  # length of the warm-up, in steps; null: see warmup_epochs
    warmup_factor: Power = 0  # warm-up starts at rate · (1 - 2^-factor): 0 starts at rate 0
    decay_epochs: tuple[Count, ...] = (40, 50)  # after these epochs the rate falls
    decay_factor: Share = 0.1  # part of the rate that a decay leaves
    momentum: Share = 0.9  # of SGD
    weight_decay: Rate = 5e-4  # of SGD, on all parameters

    trials: Count = 1  # runs one after the other, with the seeds seed, seed + 1, …
    stages: tuple[dict[str, Any], ...] = ()  # one training after the other: what differs in each; it begins with the weights before

    # Evaluation
    target: Share | None = 0.23  # AP at which training ends; null: train all epochs
    eval_every: NotNegative = 5  # evaluate after every so many epochs; 0: only after eval_epochs and the last
    eval_epochs: tuple[Count, ...] = ()  # evaluate after these epochs too
    evaluate_in_background: bool = False  # compute the figures in another process while training goes on
    eval_batch_size: Count = 32  # images a device
    score_threshold: Share = 0.05  # lowest score of a detection
    iou_threshold: Share = 0.5  # overlap from which non-maximum suppression drops a box
    max_detections: Count = 200  # kept in an image

    # Records
    runs_dir: str = "runs"  # where a run makes its folder
    log_every: Count = 10  # steps between records of the loss
    tensorboard: bool = False  # event files for TensorBoard too
    report: bool = True  # write the run's page, report.html, when it has ended
    telemetry_seconds: Rate = 1.0  # between two looks at the devices' power, memory and clock; 0: none
    checkpoint_every: NotNegative = 0  # steps between checkpoints; 0: only after each epoch, as in any case
    keep_checkpoints: Count = 2  # the last so many are kept, beside the best

    @model_validator(mode="after")
    def _possible(self) -> "Config":
        problems = []
        if self.warmup_epochs is not None and self.warmup_steps is not None:
            problems.append(
                f"warmup_epochs {self.warmup_epochs} and warmup_steps {self.warmup_steps} are both set; keep one, set the other null"
            )
        if self.batch_size % self.gradient_accumulation:
            problems.append(
                f"batch_size {self.batch_size} cannot be divided into gradient_accumulation {self.gradient_accumulation} equal parts"
            )
        if self.trials > 1 and (self.stages or self.nodes > 1):
            problems.append(f"trials {self.trials} are of one node, without stages; docs/slurm-and-containers.md has trials on several nodes")
        if self.checkpoint and self.backbone_path:
            problems.append(f"checkpoint {self.checkpoint!r} has a backbone's weights; set backbone_path {self.backbone_path!r} to null")
        if self.device_ids and (len(set(self.device_ids)) != self.devices or len(self.device_ids) != self.devices):
            problems.append(f"device_ids {list(self.device_ids)} must name as many different devices as devices says, {self.devices}")
        if self.norm_ranks and self.world_size % self.norm_ranks:
            problems.append(f"norm_ranks {self.norm_ranks} must divide the {self.world_size} ranks of nodes {self.nodes} × devices {self.devices}")
        for key in ("decay_epochs", "eval_epochs"):
            if list(getattr(self, key)) != sorted(set(getattr(self, key))):
                problems.append(f"{key} {list(getattr(self, key))} must rise")
        for key in COCO_2017:
            if Path(getattr(self, key)).is_absolute() or ".." in Path(getattr(self, key)).parts:
                problems.append(f"{key} {getattr(self, key)!r} must lie within data_dir")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def world_size(self) -> int:
        """Processes of the whole run."""
        return self.nodes * self.devices

    @property
    def global_batch(self) -> int:
        """Images of one step over all devices."""
        return self.world_size * self.batch_size

    def path(self, key: str) -> Path:
        """One of the four data paths, within ``data_dir``."""
        return Path(self.data_dir or "", getattr(self, key))


@dataclass(frozen=True)
class Resolved:
    """A configuration and, for each key, the file or flag that set it."""

    config: Config
    sources: Mapping[str, str]


class _Loader(yaml.SafeLoader):
    """Safe YAML without aliases and repeated keys; plain scalars as in YAML 1.2: 1e-3 is a number, 010, 1:30 and no are text."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(problem="aliases are not allowed", problem_mark=self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key) for key, _ in node.value]
        for number, key in enumerate(keys):
            if key in keys[:number]:
                raise yaml.MarkedYAMLError(problem=f"key {key!r} stands twice", problem_mark=node.value[number][0].start_mark)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {}
for _tag, _form in {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?(0|[1-9]\d*)",
    "float": r"[-+]?((\d+\.\d*|\.\d+)([eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(inf|Inf|INF))|\.(nan|NaN|NAN)",
}.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_form})\Z", re.ASCII), [None])
# What PyYAML raises: its own errors, and Python's for !!int x, !!bool x, !!timestamp x, numbers of 5,000 digits, deep nesting
YAML_ERRORS = (yaml.YAMLError, ValueError, LookupError, AttributeError, ArithmeticError, TypeError, RecursionError)


def resolve(folder: Path, name: str, overrides: Mapping[str, Any] | None = None) -> Resolved:
    """The configuration ``name`` of the backend in ``folder``, with ``overrides`` (key → value) from the command line.

    Raises UserError naming key, file and fix for anything that is not as the schema says.
    """
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for path in reversed(_chain(folder, name)):
        for key, value in read_mapping(path).items():
            if key != "extends":
                values[key], sources[key] = value, str(path)
    if counts := COUNTS.fullmatch(name):
        named, stated = (int(counts["nodes"]), int(counts["devices"])), (values.get("nodes", 1), values.get("devices", 1))
        if stated != named:
            raise UserError(f"{_find(folder, name)} says nodes {stated[0]}, devices {stated[1]}, but its name says {named[0]}, {named[1]}")
    for key, value in (overrides or {}).items():
        values[key], sources[key] = value, f"--{key}"
    config = validate(values, sources)
    return Resolved(config, sources)


def with_layout(resolved: Resolved, log: Callable[[str], None]) -> Resolved:
    """Of the four data paths those that no file or flag states, as they are found in ``data_dir``. Raises UserError if they are not."""
    folder, stated = Path(resolved.config.data_dir or ""), {key: getattr(resolved.config, key) for key in COCO_2017 if key in resolved.sources}
    paths, layout = find(folder, given=stated)
    if not layout:
        return resolved
    log(f"data found in {folder}: {layout}")
    sources = {**resolved.sources, **{key: f"found in data_dir: {layout}" for key in paths if key not in stated}}
    return Resolved(resolved.config.model_copy(update=paths), sources)


def read_run(path: Path) -> Config:
    """The configuration that a run's folder keeps."""
    values = read_mapping(path)
    return validate(values, dict.fromkeys(values, str(path)))


def validate(values: Mapping[str, Any], sources: Mapping[str, str]) -> Config:
    """Values as the schema has them, or UserError with one line a problem."""
    lists = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    try:
        return Config(**lists)
    except ValidationError as error:
        raise UserError("\n       ".join(_explain(problem, sources) for problem in error.errors())) from error


def _explain(problem: Mapping, sources: Mapping[str, str]) -> str:
    if not problem["loc"]:  # of several keys together: said with where each comes from
        text = problem["msg"].removeprefix("Value error, ")
        named = [f"{key} from {source}" for key, source in sources.items() if re.search(rf"\b{key}\b", text)]
        return text + (f" ({', '.join(named)})" if named else "")
    key = str(problem["loc"][0])
    where = f"{sources.get(key, 'configuration')}: "
    if problem["type"] == "extra_forbidden":
        close = difflib.get_close_matches(key, Config.model_fields, n=1, cutoff=0.5)
        return f"{where}unknown key {key!r}" + (
            f"; did you mean {close[0]!r}?" if close else f"; the keys are {', '.join(Config.model_fields)}"
        )
    value = list(problem["input"]) if isinstance(problem["input"], tuple) else problem["input"]
    if problem["type"] in ("missing", "too_long"):
        return f"{where}{key} is {value!r}: {len(typing.get_args(Config.model_fields[key].annotation))} values are needed"
    text = problem["msg"].replace("valid tuple", "list").replace("valid dictionary", "mapping")
    return f"{where}{key} is {value!r}: {text[0].lower()}{text[1:]}"


def meanings() -> dict[str, str]:
    """Key → what it means: the comments of the schema above, for ``--help``."""
    return dict(re.findall(r"^    (\w+): [^#\n]+  # (.+)$", inspect.getsource(Config), re.MULTILINE))


def parse_value(text: str) -> Any:
    """A flag's text as YAML would read it: 3, 1e-3, true, null, a name."""
    try:
        return yaml.load(text, _Loader)  # noqa: S506 (_Loader is a SafeLoader)
    except YAML_ERRORS:
        return text


def list_configs(folder: Path) -> list[str]:
    """Names of the configurations that a backend's folder brings, then the neutral ones that it can run."""
    own = sorted(path.stem for path in (folder / "config").glob("*.yaml"))
    return own + [path.stem for path in sorted(RECIPES.glob("*.yaml")) if path.stem not in own]


def _places(folder: Path) -> Sequence[Path]:
    return (folder / "config", RECIPES)


def _find(folder: Path, name: str, below: Path | None = None) -> Path:
    """The file of a configuration; ``below`` looks only in the places after that file's, so a file can extend its namesake."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise UserError(f"{below or 'configuration'}: {name!r} is not a configuration's name (letters, digits, _ . -)")
    places = list(_places(folder))
    if below is not None and below.stem == name:
        places = places[places.index(below.parent) + 1 :]
    for place in places:
        if (place / f"{name}.yaml").is_file():
            return place / f"{name}.yaml"
    known = [other for other in list_configs(folder) if below is None or other != below.stem]
    close = difflib.get_close_matches(name, known, n=2, cutoff=0.4)
    hint = f"; did you mean {' or '.join(close)}?" if close else ";"
    if below is None and (others := [n for n in list_backends() if (backend_folder(n) / "config" / f"{name}.yaml").is_file()]):
        hint = f"; add --name {' or --name '.join(others)}, or choose another;"
    raise UserError(
        f"{f'{below}: extends the unknown' if below else f'backend {folder.name} has no'} configuration {name!r}{hint} there are: {', '.join(known)}"
    )


def _chain(folder: Path, name: str) -> list[Path]:
    """The file and its parents, nearest first."""
    chain = [_find(folder, name)]
    while (parent := read_mapping(chain[-1]).get("extends")) is not None:
        path = _find(folder, parent, chain[-1])
        if path in chain:
            raise UserError(f"configurations extend each other in a ring: {' → '.join(p.stem for p in (*chain, path))}")
        chain.append(path)
    return chain


def read_mapping(path: Path) -> dict[str, Any]:
    """A small file of YAML 1.2 or JSON that holds names and values. Raises UserError naming the file if it is none."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if len(data) > LARGEST_FILE:
        raise UserError(f"{path}: {len(data)} bytes are too many for a configuration (at most {LARGEST_FILE})")
    try:
        values = yaml.load(data, _Loader)  # noqa: S506 (_Loader is a SafeLoader)
    except YAML_ERRORS as error:
        raise UserError(f"{path}: not readable as YAML: {' '.join(str(error).split()).replace('<byte string>', path.name)}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: must hold `key: value` lines, and holds {type(values).__name__}")
    if wrong := [key for key in values if not isinstance(key, str)]:
        raise UserError(f"{path}: key {wrong[0]!r} is not a name; the keys are {', '.join(Config.model_fields)}")
    return values

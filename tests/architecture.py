"""The rules that tests/test_architecture.py holds the tree to: DESIGN.md section 3 as code.

A rule is a function of a source tree that yields complaints.
"""

import ast
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

MAX_FILE_LINES = 450
MAX_FUNCTION_LINES = 80

# A room is what stands directly below fpt_fast: a module, or a package with all its modules.
BASE = frozenset({"records", "config", "files", "words", "profiling", "distributed", "hub"})
STAGES = (
    "images",
    "backbone",
    "selection",
    "cache",
    "tiers",
    "loader",
    "fusion",
    "side_network",
    "model_files",
    "peers",
    "model",
    "trainer",
    "sweep",
    "report",
)
HELPERS = {
    "metrics": {"records", "finding_metrics", "value_metrics"},
    "finding_metrics": {"records", "metrics"},
    "value_metrics": {"records", "metrics"},
    "losses": {"records", "config"},
    "interrupts": set[str](),
    "tracking": {"records"},
    "accounting": {"records"},
    "trust": {"records", "words", "metrics", "value_metrics"},
    "explanation": {"records", "fusion"},
    "portable": {"records", "config", "backbone", "selection", "fusion", "side_network", "model"},
    "doctor": {"records", "words", "images"},
}
# Stages that may see less than what stands upstream of them.
NARROW = {
    # Of the ops only read_records, which is how the cache reaches the C++ extension.
    "cache": BASE | {"ops"},
    "tiers": BASE | {"cache"},
    "trainer": BASE | {"ops", "losses", "metrics", "interrupts"},
    "sweep": BASE
    | {"ops", "fusion", "side_network", "model_files", "model", "losses", "metrics", "interrupts"}
    | {"trainer"},
    "report": BASE | {"metrics", "trust"},
}
BELOW_PIPELINE = BASE | set(STAGES) | set(HELPERS) | {"ops"}

ALLOWED_ROOMS: dict[str, frozenset[str]] = {
    "records": frozenset(),
    "files": frozenset(),
    "words": frozenset(),
    "profiling": frozenset(),
    "distributed": frozenset(),
    "hub": frozenset(),
    "config": frozenset({"records"}),
    "ops": frozenset({"records", "config"}),
    **{
        stage: NARROW.get(stage, BASE | {"ops"} | set(STAGES[:position]))
        for position, stage in enumerate(STAGES)
    },
    **{name: frozenset(rooms) for name, rooms in HELPERS.items()},
    "compat": frozenset(BELOW_PIPELINE),
    "settings": frozenset({"records", "config"}),
    "cache_settings": frozenset({"records", "settings"}),
    "run_settings": frozenset({"records", "config", "settings"}),
    "setting_values": frozenset({"config", "words"}),
    "first_look": frozenset({"config", "hub", "settings", "run_settings", "setting_values"}),
    "pipeline": frozenset(
        BELOW_PIPELINE | {"compat", "settings", "run_settings", "cache_settings", "setting_values"}
    ),
    "demo": frozenset(BELOW_PIPELINE | {"pipeline", "settings"}),
    "info": frozenset({"ops", "backbone"}),
    "cli": frozenset(
        {
            *("config", "interrupts", "settings", "run_settings", "cache_settings"),
            "setting_values",
            *("pipeline", "demo", "info", "first_look", "words"),
            *("distributed", "records"),
        }
    ),
    "__main__": frozenset({"cli"}),
    "__init__": frozenset(BELOW_PIPELINE | {"pipeline"}),
}

# Where a room is meant to know little, also what it may import from outside (beside the stdlib).
ALLOWED_PACKAGES = {
    "records": {"torch"},
    "config": set[str](),
    "files": set[str](),
    "profiling": {"nvtx", "torch"},
    "distributed": {"torch"},
    "hub": {"huggingface_hub"},
    "ops": {"torch"},
    "cache": {"torch", "numpy", "xxhash"},
    "metrics": {"torch", "numpy", "sklearn"},
    "finding_metrics": {"torch", "numpy", "sklearn"},
    "value_metrics": {"torch", "numpy"},
    "trust": {"torch", "numpy"},
    "losses": {"torch"},
    "fusion": {"torch"},
    "explanation": {"torch"},
    "portable": {"torch"},
    "side_network": {"torch"},
    "selection": {"torch"},
    "trainer": {"torch", "numpy", "safetensors", "tqdm"},
}
THIRD_PARTY = {
    *("fptkernels", "huggingface_hub", "matplotlib", "numpy", "nvtx", "omegaconf", "peft", "PIL"),
    *("psutil", "safetensors", "scipy", "skimage", "sklearn", "tensorboard", "timm", "torch"),
    *("torchvision", "tqdm", "transformers", "triton", "tyro", "xformers", "xxhash", "yaml"),
}

PICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve"}

Rule = Callable[[Path], Iterator[str]]


def python_files(root: Path, *folders: str) -> Iterator[Path]:
    for folder in folders:
        yield from sorted((root / folder).rglob("*.py"))


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def room_of(path: Path, root: Path) -> str:
    first = path.relative_to(root / "python" / "fpt_fast").parts[0]
    return first.removesuffix(".py")


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Every imported module, functions and TYPE_CHECKING blocks included: (line, dotted name)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            if base == "fpt_fast":
                yield from ((node.lineno, f"fpt_fast.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, base


def import_table(root: Path) -> Iterator[str]:
    """A room imports the rooms and packages that the table allows it, and nothing by dots."""
    for path in python_files(root, "python/fpt_fast"):
        room = room_of(path, root)
        where = path.relative_to(root)
        if room not in ALLOWED_ROOMS:
            yield f"{where}: {room} has no row in the import table"
            continue
        for line, name in imported(parse(path)):
            package, _, rest = name.partition(".")
            if name.startswith("."):
                yield f"{where}:{line}: relative import"
            elif package == "fpt_fast":
                target = rest.partition(".")[0]
                if target not in ALLOWED_ROOMS[room] | {room, "__version__"}:
                    yield f"{where}:{line}: {room} must not import {name}"
            elif package in THIRD_PARTY and room in ALLOWED_PACKAGES:
                lazily = {"fptkernels"} if where.name == "library.py" else set()
                if package not in ALLOWED_PACKAGES[room] | lazily:
                    yield f"{where}:{line}: {room} must not import {name}"


def kernels_stay_behind_the_library(root: Path) -> Iterator[str]:
    """fptkernels is named in ops/library.py alone, and imported there only inside functions."""
    for path in python_files(root, "python/fpt_fast"):
        tree = parse(path)
        where = path.relative_to(root)
        is_library = where.as_posix() == "python/fpt_fast/ops/library.py"
        lazy = [n for f in functions(tree) for n in ast.walk(f)] if is_library else []
        for node in ast.walk(tree):
            names = (
                [name for _, name in imported(ast.Module([node], []))] if is_import(node) else []
            )
            if any(name.partition(".")[0] == "fptkernels" for name in names) and node not in lazy:
                yield f"{where}:{node.lineno}: imports fptkernels"  # type: ignore[attr-defined]
            value = node.value if isinstance(node, ast.Constant) else None
            if isinstance(value, str) and re.match(r"fptkernels(\.\w+)*$", value):
                yield from [] if is_library else [f"{where}: names {value}"]
    for path in python_files(root, "fptkernels"):
        for line, name in imported(parse(path)):
            package = name.partition(".")[0]
            if package not in {"fptkernels", "torch", "triton", *sys.stdlib_module_names}:
                yield f"{path.relative_to(root)}:{line}: fptkernels must not import {name}"


def is_import(node: ast.AST) -> bool:
    return isinstance(node, ast.Import | ast.ImportFrom)


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def sizes(root: Path) -> Iterator[str]:
    """Files and functions stay short enough to read."""
    for path in python_files(root, "python", "fptkernels", "benchmarks", "scripts", "tests"):
        where = path.relative_to(root)
        lines = path.read_text(encoding="utf-8").count("\n")
        if lines > MAX_FILE_LINES:
            yield f"{where}: {lines} lines, at most {MAX_FILE_LINES}"
        for function in functions(parse(path)):
            length = (function.end_lineno or function.lineno) - function.lineno + 1
            if length > MAX_FUNCTION_LINES:
                yield f"{where}:{function.lineno}: {function.name} has {length} lines"


def docstrings(root: Path) -> Iterator[str]:
    """Modules, and public classes, functions and methods of the library, say what they are."""
    for path in python_files(root, "python/fpt_fast"):
        tree = parse(path)
        where = path.relative_to(root)
        if not ast.get_docstring(tree):
            yield f"{where}: no docstring"
        for owner in [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef))]:
            if isinstance(owner, ast.ClassDef) and owner.name.startswith("_"):
                continue
            for node in owner.body:
                if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                    continue
                is_protocol_member = [ast.unparse(line) for line in node.body] == ["..."]
                if node.name.startswith("_") or is_protocol_member:
                    continue
                if not ast.get_docstring(node):
                    yield f"{where}:{node.lineno}: {node.name} has no docstring"


def bans(root: Path) -> Iterator[str]:
    """No print, pickle, star import, autotune, unfinished body, or open end without an issue."""
    for path in python_files(root, "python", "fptkernels"):
        where = path.relative_to(root)
        for node in ast.walk(parse(path)):
            if complaint := banned(node, in_compat="compat" in where.parts):
                yield f"{where}:{node.lineno}: {complaint}"  # type: ignore[attr-defined]
    for path in python_files(root, "python", "fptkernels", "benchmarks", "scripts", "tests"):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if re.search(r"#.*\b([T]ODO|[F]IXME|[X]XX)\b(?!.*(#\d+|[<>=]=? ?\d))", line):
                yield f"{path.relative_to(root)}:{number}: an open end without issue or version"


def banned(node: ast.AST, *, in_compat: bool) -> str | None:
    """What is wrong with one node; compat alone writes the authors' own format, a `.pt` file."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        names = [name.partition(".")[0] for _, name in imported(ast.Module([node], []))]
        # The error that torch.load raises on what it refuses to load is harmless.
        is_error = [alias.name for alias in node.names] == ["UnpicklingError"]
        if PICKLERS & set(names) and not is_error:
            return "pickle"
        if any(alias.name == "*" for alias in node.names):
            return "star import"
    if isinstance(node, ast.Raise) and "NotImplementedError" in ast.unparse(node):
        return "NotImplementedError"
    if isinstance(node, ast.Call):
        called = ast.unparse(node.func)
        words = {word.arg: ast.unparse(word.value) for word in node.keywords}
        if called == "print":
            return "print"
        if called.endswith("autotune"):
            return "autotune"
        if called == "torch.save" and not in_compat:
            return "torch.save writes a pickle"
        if called == "torch.load" and words.get("weights_only") != "True":
            return "torch.load without weights_only=True"
        if called.endswith(".load") and words.get("allow_pickle") == "True":
            return "allow_pickle=True"
    return None


def records(root: Path) -> Iterator[str]:
    """Records, configurations and settings are frozen; no field is a dict or choice of tensors."""
    for name in ("records", "config", "settings", "run_settings", "cache_settings"):
        path = root / "python" / "fpt_fast" / f"{name}.py"
        if not path.exists():
            continue
        for node in ast.walk(parse(path)):
            if not isinstance(node, ast.ClassDef):
                continue
            decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
            is_frozen = any(d.startswith("dataclass(") and "frozen=True" in d for d in decorators)
            if (name == "records" or any("dataclass" in d for d in decorators)) and not is_frozen:
                yield f"{name}.py:{node.lineno}: {node.name} is not a frozen dataclass"
            for field in (f for f in node.body if isinstance(f, ast.AnnAssign)):
                kind = ast.unparse(field.annotation)
                if "Tensor" in kind and re.search(r"dict|Mapping|Any|tuple.*\||\|.*tuple", kind):
                    yield f"{name}.py:{field.lineno}: {node.name} holds {kind}"


def ops_of(root: Path) -> dict[str, str]:
    """Every op that has an oracle, and the name of its file: its own, or that of its family."""
    path = root / "python" / "fpt_fast" / "ops" / "reference.py"
    names = [node.name for node in parse(path).body if isinstance(node, ast.FunctionDef)]
    ops = [n for n in names if not n.startswith("_") and not n.endswith("_backward")]
    return {op: min((o for o in ops if op == o or op.startswith(o + "_")), key=len) for op in ops}


def one_op_one_name(root: Path) -> Iterator[str]:
    """An op has one name in every place: op, schema, oracle, test, benchmark, docs, kernel."""
    ops = ops_of(root)
    ops_folder = root / "python/fpt_fast/ops"
    library = (ops_folder / "library.py").read_text(encoding="utf-8")
    schemas = "".join(p.read_text(encoding="utf-8") for p in ops_folder.glob("*_schemas.py"))
    design = (root / "DESIGN.md").read_text(encoding="utf-8")
    for op, family in ops.items():
        public = root / f"python/fpt_fast/ops/{family}.py"
        if not public.exists() or op not in {f.name for f in functions(parse(public))}:
            yield f"{op}: no public function in {public.relative_to(root)}"
        for place in (f"tests/ops/test_{family}.py", f"benchmarks/bench_{family}.py"):
            path = root / place
            if not path.exists() or not re.search(rf"\b{op}\b", path.read_text(encoding="utf-8")):
                yield f"{op}: not in {place}"
        if not re.search(rf"\b{op}\b", library):
            yield f"{op}: no implementation in ops/library.py"
        if not re.search(rf"\b{op}\b", schemas):
            yield f"{op}: no schema in ops/frozen_schemas.py or ops/trained_schemas.py"
        if not re.search(rf"\| `{op}\(", design):
            yield f"{op}: no row in DESIGN.md"
    shared = {
        "__init__",
        "compile_report",
        "launch_table",
        "primitives",
        "levels",
        "attend_heads",
        "hash",
        "prompt_products",
    }
    for folder, suffix in (("fptkernels", ".py"), ("csrc", ".cpp")):
        for path in sorted((root / folder).glob(f"*{suffix}")):
            known = {*ops.values(), *shared, "register"}
            known |= {"read_records", "resample_images", "clipped_adam"}
            if path.stem not in known and not path.stem.startswith("level_"):
                yield f"{path.relative_to(root)}: kernel of no op"


def native_stays_behind_its_door(root: Path) -> Iterator[str]:
    """C++ is short, knows no Python and registers in one file; ops/native*.py alone call it."""
    sources = (p for p in (root / "csrc").rglob("*") if p.suffix in {".h", ".cpp"})
    for path in sorted(sources):
        text = path.read_text(encoding="utf-8")
        where = path.relative_to(root)
        if text.count("\n") > MAX_FILE_LINES:
            yield f"{where}: {text.count(chr(10))} lines, at most {MAX_FILE_LINES}"
        if re.search(r"Python\.h|pybind11|PyInit|torch/extension\.h|\bat::|\bc10::", text):
            yield f"{where}: not the stable ABI, or Python"
        if re.search(r"STABLE_TORCH_LIBRARY", text) and path.name != "register.cpp":
            yield f"{where}: registers beside register.cpp"
    for path in python_files(root, "python/fpt_fast"):
        is_door = path.parent.name == "ops" and path.name.startswith("native")
        if not is_door and "fpt_native" in path.read_text(encoding="utf-8"):
            yield f"{path.relative_to(root)}: names fpt_native"


def layout_is_documented(root: Path) -> Iterator[str]:
    """Every module and package directly below fpt_fast stands in the layout of DESIGN.md."""
    design = (root / "DESIGN.md").read_text(encoding="utf-8")
    layout = design.partition("## 3.")[2].partition("## 4.")[0]
    for path in sorted((root / "python" / "fpt_fast").iterdir()):
        is_package = path.is_dir() and any(path.glob("*.py"))
        name = f"{path.name}/" if is_package else path.name
        if (is_package or path.suffix == ".py") and not re.search(rf"[ \n]{name}[ \n]", layout):
            yield f"{name} is not in section 3 of DESIGN.md"


def contributing_paths(root: Path) -> Iterator[str]:
    """Every path in CONTRIBUTING.md exists; ``<op>`` stands for the file of any op."""
    text = (root / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for path in re.findall(r"`([\w.<>-]+(?:/[\w.<>-]*)+|[\w.-]+\.(?:md|py|toml))`", text):
        if "<op>" not in path:
            if not (root / path).exists():
                yield f"{path}: named in CONTRIBUTING.md, does not exist"
        elif not (root / path).parent.is_dir():
            yield f"{path}: named in CONTRIBUTING.md, its folder does not exist"
        elif not path.startswith(("fptkernels/", "csrc/")):
            for family in set(ops_of(root).values()):
                if not (root / path.replace("<op>", family)).exists():
                    yield f"{path}: named in CONTRIBUTING.md, does not exist for {family}"


RULES: tuple[Rule, ...] = (
    import_table,
    kernels_stay_behind_the_library,
    sizes,
    docstrings,
    bans,
    records,
    one_op_one_name,
    native_stays_behind_its_door,
    layout_is_documented,
    contributing_paths,
)

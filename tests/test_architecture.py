"""The layout's rules, which reviews forget and a test does not: who imports whom, one stem per op, sizes."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import torch

import safe_kernels
from safe_kernels import flops, functional, reference, triton

ROOT = Path(__file__).parents[1]
KERNELS, POLICY, NATIVE = ROOT / "safe_kernels", ROOT / "python" / "safe_peft", ROOT / "csrc"
PYTHON = sorted(path for folder in (KERNELS, POLICY, ROOT / "tests", ROOT / "bench") for path in folder.rglob("*.py"))
CPP = sorted(path for kind in ("*.cpp", "*.h") for path in NATIVE.rglob(kind))
MAX_FILE, MAX_FUNCTION, MAX_KERNEL = 500, 60, 120


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(path: Path) -> Iterator[tuple[str, str]]:
    """Modules that a file imports, wherever it does, with the names taken from them; relative ones resolved."""
    return (pair for _, pair in imported(path, ast.parse(path.read_text())))


def imported(path: Path, tree: ast.Module) -> Iterator[tuple[ast.AST, tuple[str, str]]]:
    """The same, each with its node."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, (alias.name, "")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                package = path.relative_to(path.parents[len(path.relative_to(POLICY.parent).parts) - 1]).parts
                module = ".".join((*package[: -node.level], *filter(None, [module])))
            yield from ((node, (module, alias.name)) for alias in node.names)


def users_of(package: str, folder: Path) -> set[str]:
    return {
        str(path.relative_to(folder))
        for path in folder.rglob("*.py")
        if any(module.split(".")[0] == package for module, _ in imports(path))
    }


# ---------------------------------------------------------------- who imports whom

FLOORS = (
    {"errors"},
    {"bottleneck", "files", "distributed"},
    {"binding"},
    {"loss", "planning", "prefix"},
    {"report"},
    {"freezing"},
    {"callback", "lightning"},
    {"finetune"},
    {"cli"},
)
"""The rooms of safe_peft: each imports from the floors below its own, and from itself."""


def loads(path: Path) -> Iterator[str]:
    """Modules of safe_peft that a file loads, late imports included, as dotted names below the package."""
    for module, name in runtime_imports(path):
        if module.split(".")[0] == "safe_peft":
            full = ".".join((*module.split(".")[1:], name))
            file = POLICY.joinpath(*full.split("."))
            known = file.with_suffix(".py").exists() or (file / "__init__.py").exists()
            yield full if known else full.rpartition(".")[0]


def runtime_imports(path: Path) -> set[tuple[str, str]]:
    """`imports`, less those that are for annotations alone."""
    tree = ast.parse(path.read_text())
    guards = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    typed = {id(node) for guard in guards for child in guard.body for node in ast.walk(child)}
    return {pair for node, pair in imported(path, tree) if id(node) not in typed}


def test_rooms_are_built_on_lower_floors() -> None:
    floor = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    rooms = {path.relative_to(POLICY).parts[0].removesuffix(".py") for path in POLICY.rglob("*.py")} - {"__init__"}
    assert rooms == set(floor)
    for path in POLICY.rglob("*.py"):
        room = path.relative_to(POLICY).parts[0].removesuffix(".py")
        if room != "__init__":
            others = {found.split(".")[0] for found in loads(path)} - {room}
            assert all(floor[other] < floor[room] for other in others), f"{name_of(path)} imports {others}"


def test_no_module_needs_itself() -> None:
    """No circle of imports, late ones included."""
    files = {
        ".".join(path.relative_to(POLICY).with_suffix("").parts).removesuffix(".__init__"): path
        for path in POLICY.rglob("*.py")
    }
    del files["__init__"]
    graph = {name: {found for found in loads(path) if found in files and found != name} for name, path in files.items()}
    TopologicalSorter(graph).prepare()


def test_few_files_stand_at_the_top() -> None:
    assert len(list(POLICY.glob("*.py"))) <= 6


@pytest.mark.parametrize("package", ["peft", "transformers", "accelerate", "datasets", "safe_peft"])
def test_the_kernels_know_tensors_only(package: str) -> None:
    assert users_of(package, KERNELS) == set()


def test_pefts_layers_are_known_to_the_adapters_alone() -> None:
    users = users_of("peft", POLICY)
    # Making a PEFT model for the command line is PEFT's public API, not its layers.
    own = ("binding/adapters/", "bottleneck/")  # bottleneck adapters are a tuner of our own
    assert {user for user in users if not user.startswith(own)} <= {"finetune/models.py"}
    assert "binding/adapters/lora.py" in users, "the test must see what it looks for"
    internals = {
        str(path.relative_to(POLICY))
        for path in POLICY.rglob("*.py")
        if any(module.startswith("peft.tuners") for module, _ in imports(path))
    }
    assert all(user.startswith(own) for user in internals)


def test_the_trainer_is_known_to_the_callback_and_the_command_alone() -> None:
    users = {
        str(path.relative_to(POLICY))
        for path in POLICY.rglob("*.py")
        for module, name in imports(path)
        if module.startswith("transformers") and (name.startswith("Train") or "trainer" in module)
    }
    assert users == {"callback.py", "finetune/training.py"}


def test_the_extension_is_loaded_in_one_place() -> None:
    loaders = {
        path.name
        for path in [*KERNELS.rglob("*.py"), *POLICY.rglob("*.py")]
        if any("_C" in (name, module.split(".")[-1]) and "safe_kernels" in module for module, name in imports(path))
    }
    # The doctor only asks it how it was built; plans are made of its classes, tensors found by it, and the
    # values of norms read by it.
    assert loaders <= {"__init__.py", "launch_replay.py", "retention.py", "doctor.py", "inversion.py"}


def test_triton_ops_are_built_on_lib_and_lib_on_runtime() -> None:
    folder = KERNELS / "triton"
    for room, below in (("lib", {"lib", "runtime"}), ("runtime", {"runtime"})):
        for path in (folder / room).glob("*.py"):
            inside = [module.split(".") for module, _ in imports(path) if module.startswith("safe_kernels.triton")]
            assert {module[2] for module in inside} <= below, name_of(path)


def test_no_device_branches() -> None:
    """PyTorch's dispatcher is the only dispatcher."""
    pattern = re.compile(r"(device\.type|\.is_cuda|\.is_cpu|is_available\(\))")
    found = [name_of(path) for path in KERNELS.rglob("*.py") if pattern.search(path.read_text())]
    assert not found


# ---------------------------------------------------------------- one stem, one op, one set of argument names


def stems(folder: str) -> set[str]:
    return {path.stem for path in (NATIVE / folder).glob("*.cpp")}


def test_an_op_has_the_same_stem_everywhere() -> None:
    assert stems("ops") == stems("autograd")
    assert stems("ops") <= stems("cpu") | stems("aten"), "besides the ops, building blocks that several of them use"
    assert not stems("cpu") & stems("aten"), "one kernel of PyTorch's own ops serves CPUs and GPUs"
    assert {path.stem for path in (NATIVE / "ops").glob("*.h")} == stems("ops")


def test_a_kernels_file_registers_it() -> None:
    """Registration is the last block of the kernel's own file; building blocks register nothing."""
    kernels = stems("ops") - stems("aten")
    for folder, keys, served in (
        ("cpu", ["CPU"], kernels),
        ("aten", ["CPU", "CUDA"], stems("aten")),
        ("autograd", ["Autograd"], stems("ops")),
    ):
        registering = {p.stem for p in (NATIVE / folder).glob("*.cpp") if "TORCH_LIBRARY_IMPL" in p.read_text()}
        assert registering == served
        for path in (NATIVE / folder).glob("*.cpp"):
            assert re.findall(r"TORCH_LIBRARY_IMPL\(safe_kernels, (\w+),", path.read_text()) in ([], keys)


def ops() -> list[str]:
    """Without overloads, which call the op of the same name."""
    names = [
        name for name in torch._C._dispatch_get_all_op_names() if name.startswith("safe_kernels::") and "." not in name
    ]
    return sorted(name.removeprefix("safe_kernels::") for name in names)


def argument_names(op: str) -> list[str]:
    return [argument.name for argument in getattr(torch.ops.safe_kernels, op).default._schema.arguments]


def test_the_reference_is_registered_for_every_op() -> None:
    assert sorted(op.__name__ for op in reference.OPS) == ops()


def test_every_op_belongs_to_a_stem() -> None:
    assert {op.removesuffix("_backward") for op in ops()} == stems("ops")


@pytest.mark.parametrize("op", ops())
def test_schema_and_reference_name_the_same_arguments(op: str) -> None:
    assert list(inspect.signature(getattr(reference, op)).parameters) == argument_names(op)


def triton_ops() -> list[str]:
    return [op for op in ops() if op.removesuffix("_backward") not in stems("aten")]


def triton_function(op: str) -> ast.FunctionDef:
    """The host function's source: the rules hold where Triton is not installed, too."""
    stem = op.removesuffix("_backward")
    tree = ast.parse((KERNELS / "triton" / f"{stem}.py").read_text())
    (found,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == op]
    return found


def test_triton_serves_every_op_from_the_file_of_its_stem() -> None:
    assert sorted(op for served in triton.STEMS.values() for op in served) == triton_ops()
    for stem, served in triton.STEMS.items():
        assert {op.removesuffix("_backward") for op in served} == {stem}


@pytest.mark.parametrize("op", triton_ops())
def test_schema_and_triton_function_name_the_same_arguments(op: str) -> None:
    arguments = triton_function(op).args
    assert [argument.arg for argument in arguments.args] == argument_names(op)
    defaults = inspect.signature(getattr(reference, op)).parameters.values()
    expected = [parameter.default for parameter in defaults if parameter.default is not inspect.Parameter.empty]
    assert [ast.literal_eval(default) for default in arguments.defaults] == expected


def test_a_kernel_for_gpus_is_named_so() -> None:
    """`_xxx_kernel` runs on the GPU, helpers of kernels begin with an underscore, and host functions do not."""
    for path in (KERNELS / "triton").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(d) for d in node.decorator_list):
                assert node.name.startswith("_"), node.name
            elif isinstance(node, ast.FunctionDef):
                assert not node.name.endswith("_kernel"), node.name


@pytest.mark.parametrize("op", [op for op in ops() if hasattr(flops, f"{op}_flop")])
def test_a_flop_formula_names_arguments_of_its_schema(op: str) -> None:
    """Ops that are no products of matrices count no FLOPs, as everywhere in torch's counter, and need no formula."""
    formula = [name for name in inspect.signature(getattr(flops, f"{op}_flop")).parameters if name != "out_shape"]
    assert formula == [name for name in argument_names(op) if name in formula]


@pytest.mark.parametrize("op", [op for op in ops() if not op.endswith("_backward")])
def test_schema_and_public_function_name_the_same_arguments(op: str) -> None:
    public = list(inspect.signature(getattr(functional, op)).parameters)
    blocks = ["block_starts", "block_rows", "row_weight"]
    schema = [name for name in argument_names(op) if name not in blocks]
    scores = ["statistics"] if schema != argument_names(op) else []
    assert sorted(public) == sorted([*schema, *scores]), "statistics stands for the row blocks"
    positional = [
        p.name for p in inspect.signature(getattr(functional, op)).parameters.values() if p.kind != p.KEYWORD_ONLY
    ]
    assert positional == schema[: len(positional)]
    assert getattr(safe_kernels, op) is getattr(functional, op)


@pytest.mark.parametrize("op", ops())
def test_defaults_agree(op: str) -> None:
    parameters = inspect.signature(getattr(reference, op)).parameters
    for argument in getattr(torch.ops.safe_kernels, op).default._schema.arguments:
        default = parameters[argument.name].default
        assert (default is not inspect.Parameter.empty) == argument.has_default_value(), argument.name
        if argument.has_default_value():
            assert default == argument.default_value, argument.name


@pytest.mark.parametrize("op", ops())
@pytest.mark.parametrize("key", ["CPU", "Autograd", "CompositeExplicitAutograd"])
def test_every_op_has_its_kernels(op: str, key: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"safe_kernels::{op}", key)


# ---------------------------------------------------------------- sizes


def test_files_are_small() -> None:
    sizes = {name_of(path): len(path.read_text().splitlines()) for path in (*PYTHON, *CPP)}
    long = {name: lines for name, lines in sizes.items() if lines > MAX_FILE}
    assert not long, f"split them, at most {MAX_FILE} lines"


def python_functions(path: Path) -> Iterator[tuple[str, int]]:
    """Functions and their lines of code: docstrings are there to be long."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            yield node.name, (node.end_lineno or 0) - body[0].lineno + 1 if body else 0


def cpp_functions(path: Path) -> Iterator[tuple[str, int]]:
    """Blocks that open on a line of a function's head and close in the same column."""
    head, start = "", 0
    for number, line in enumerate(path.read_text().splitlines()):
        if re.match(r"^(?!namespace|struct|class|TORCH_LIBRARY|extern|#|//)\S.*\{$", line) and "(" in line + head:
            head, start = line, number
        elif line.startswith("}") and head:
            yield head, number - start - 1
            head = ""


def test_functions_are_short() -> None:
    python = {path: list(python_functions(path)) for path in PYTHON}
    cpp = {path: list(cpp_functions(path)) for path in CPP}
    assert any(cpp.values())
    long = [
        (name_of(path), name, lines)
        for path, functions in {**python, **cpp}.items()
        for name, lines in functions
        if lines > (MAX_KERNEL if path.suffix == ".py" and name.endswith("_kernel") else MAX_FUNCTION)
    ]
    assert not long, f"at most {MAX_FUNCTION} lines a function"
    source = [path for path in PYTHON if KERNELS in path.parents or POLICY in path.parents]
    sizes = sorted(lines for path in source for _, lines in python[path])
    assert sizes[len(sizes) // 2] <= 15, "as a rule"

"""Values beside weights in a pickle: harmless ones are skipped, so that no code runs for them."""

from collections.abc import Callable


class Skipped:
    """Stand-in for a value that is not read: takes any arguments and state, and does nothing."""

    __slots__ = ()

    def __new__(cls, *_arguments: object) -> "Skipped":
        """Accept the arguments of any type."""
        return super().__new__(cls)

    def __init__(self, *_arguments: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def _as_dict(*_arguments: object) -> dict:
    return {}


def _as_list(*_arguments: object) -> list:
    return []


_NUMPY_SCALARS = ("bool", "bool_", "str_", "bytes_", "datetime64", "timedelta64")
_NUMPY_SCALARS += tuple(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))
_NUMPY_SCALARS += ("float16", "float32", "float64", "longdouble", "complex64", "complex128")
_BUILTINS = ("bool", "int", "float", "str", "bytes", "list", "dict", "tuple", "frozenset")
_BUILTINS += ("range", "slice")
_PATHS = ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")
# Types and functions that pickles of harmless values name. A pickle that names anything else is
# refused, although a stand-in would be safe, because nobody knows what it is.
_HARMLESS = {
    "numpy.core.multiarray": ("scalar", "_reconstruct"),  # of numpy 1
    "numpy._core.multiarray": ("scalar", "_reconstruct"),
    "numpy": ("ndarray", "dtype", *_NUMPY_SCALARS),
    "numpy.random._pickle": ("__randomstate_ctor", "__bit_generator_ctor", "__generator_ctor"),
    "numpy.random._mt19937": ("MT19937",),
    "numpy.random._pcg64": ("PCG64", "PCG64DXSM"),
    "numpy.random._philox": ("Philox",),
    "numpy.random._sfc64": ("SFC64",),
    "numpy.random.bit_generator": ("SeedSequence", "__pyx_unpickle_SeedSequence"),
    "random": ("Random",),
    "pathlib": _PATHS,
    "pathlib._local": _PATHS,  # of Python 3.13
    "datetime": ("datetime", "date", "time", "timedelta", "timezone"),
    "decimal": ("Decimal",),
    "fractions": ("Fraction",),
    "uuid": ("UUID",),
    "types": ("SimpleNamespace",),
    "torch.torch_version": ("TorchVersion",),
    "builtins": _BUILTINS,
}
# (what is called instead, name in a pickle), as torch.serialization.safe_globals takes them.
HARMLESS: list[tuple[Callable, str]] = [
    *((Skipped, f"{module}.{name}") for module, names in _HARMLESS.items() for name in names),
    (_as_dict, "collections.defaultdict"),
    (_as_list, "collections.deque"),
]

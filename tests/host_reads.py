"""A mode in which whoever reads a value of the device on the host is told so."""

from torch.utils._python_dispatch import TorchDispatchMode


class NoHostReads(TorchDispatchMode):
    """Raises where the host would wait for a value of the device."""

    FORBIDDEN = (
        "_local_scalar_dense",
        "nonzero",
        "is_nonzero",
        "equal",
        "masked_select",
        "unique",
        "bincount",
    )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket._qualified_op_name.removeprefix("aten::")
        if any(name == f or name.startswith((f"{f}_", f"_{f}")) for f in self.FORBIDDEN):
            raise AssertionError(f"{name} reads a value on the host")
        return func(*args, **(kwargs or {}))

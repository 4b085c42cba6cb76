"""pointers: what TorchInductor generates around a part's kernels, as one C function of pointers.

AOTInductor's own wrapper knows shapes, devices, errors and weights, and takes ten times as long to compile as the
kernels of a layer. A part of static shapes whose tensors lie where its caller says needs none of it::

    extern "C" void flashinf_part(char* const* inputs, char* const* outputs);

Buffers between kernels lie on the stack, or in memory of the call's own where they are large.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch._inductor import codecache, ir, lowering
from torch._inductor.codegen import common
from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu
from torch._inductor.cpp_builder import CppBuilder, CppTorchOptions
from torch._inductor.cpu_vec_isa import pick_vec_isa
from torch._inductor.virtualized import V

from .kernels import block  # registers its operator
from .layers import returned_values, strided_alike
from .native import ENTRY

_ALIGNMENT = 64  # bytes, of a buffer
_MOST_ON_STACK = 1 << 17  # bytes, of all buffers on the stack

# TorchInductor's names of products into memory that is given, and how many tensors and factors each takes.
_PRODUCTS = {"mm": (2, 0), "bmm": (2, 0), "addmm": (3, 2), "baddbmm": (3, 2)}
_DTYPES = ("float64", "float32", "bfloat16", "float16")

# Products of so few rows that to read the weight is most of their cost are ours.
_SKINNY = Path(__file__).with_name("skinny_gemm.h").read_text()
_KINDS = {torch.float32: "float", torch.float64: "double"}
_MOST_ROWS = 32

# The sum inside a base block, `kernels.block.block_sum`, is ours too.
_BLOCK_SUM = Path(__file__).with_name("block_sum.h").read_text()


def _declarations() -> str:
    lines = [f"int32_t aoti_torch_dtype_{dtype}();" for dtype in _DTYPES]
    for name, (tensors, factors) in _PRODUCTS.items():
        takes = ["AtenTensorOpaque*"] * (1 + tensors) + ["double"] * factors
        lines.append(f"int32_t aoti_torch_cpu_{name}_out({', '.join(takes)});")
    return "\n".join(lines)


_HEADER = f"""
{_SKINNY}
{_BLOCK_SUM}
#include <initializer_list>
#include <memory>
#include <new>
#include <stdexcept>

// Kernels are called with pointers to these, whose insides do not matter here.
namespace at {{
struct BFloat16; struct Half; template <typename> struct complex;
struct Float8_e4m3fn; struct Float8_e5m2; struct Float8_e4m3fnuz; struct Float8_e5m2fnuz;
}}
// Products of matrices are torch's own, which takes tensors.
extern "C" {{
struct AtenTensorOpaque;
int32_t aoti_torch_create_tensor_from_blob(void* data, int64_t ndim, const int64_t* sizes, const int64_t* strides,
    int64_t offset, int32_t dtype, int32_t device_type, int32_t device_index, AtenTensorOpaque** made);
int32_t aoti_torch_delete_tensor_object(AtenTensorOpaque*);
{_declarations()}
}}
using Sizes = std::initializer_list<int64_t>;
inline void check(int32_t failed) {{ if (failed) throw std::runtime_error("a product of matrices failed"); }}
struct Matrix {{
  AtenTensorOpaque* tensor = nullptr;
  Matrix(char* data, Sizes sizes, Sizes strides, int32_t dtype) {{
    check(aoti_torch_create_tensor_from_blob(
        data, static_cast<int64_t>(sizes.size()), sizes.begin(), strides.begin(), 0, dtype, 0, -1, &tensor));
  }}
  Matrix(const Matrix&) = delete;
  ~Matrix() {{ aoti_torch_delete_tensor_object(tensor); }}
}};

struct Free {{ void operator()(char* p) const {{ ::operator delete(p, std::align_val_t({_ALIGNMENT})); }} }};
"""


def generate_source(part: fx.GraphModule, example: Sequence[Tensor]) -> str:
    """The C++ of a part: its kernels, and ``flashinf_part`` around them.

    ``example``: tensors that lie as the part's inputs do. Raises NotImplementedError where something other than a
    kernel is called, or whatever TorchInductor raises.
    """
    from torch._inductor import aot_compile

    outputs, found = tuple(returned_values(part)), []

    class Wrapper(_Wrapper):
        expected = outputs

        @staticmethod
        def create(*_: Any, **__: Any) -> Wrapper:
            return Wrapper()

    class Compiler:
        @staticmethod
        def compile(graph: Any, wrapper: str, kernels: str, *_: Any, **__: Any) -> str:
            found.append(f"{kernels}\n{wrapper}")
            return ""

    common.init_backend_registration()
    usual = common.device_codegens["cpu"], codecache.AotCodeCompiler
    common.device_codegens["cpu"] = dataclasses.replace(usual[0], cpp_wrapper_codegen=Wrapper)
    codecache.AotCodeCompiler = Compiler
    lowering.lowerings[_SUM] = _lowered_sum
    try:
        aot_compile(part, tuple(example))
    finally:
        common.device_codegens["cpu"], codecache.AotCodeCompiler = usual
        del lowering.lowerings[_SUM]
    (source,) = found
    return source


_SUM = block.OPERATOR


def _lowered_sum(inputs: Any, table: Any, j: Any, source: Any = None) -> Any:
    (_, batch, _), (_, channels) = inputs.get_size(), table.get_size()
    given = [ir.ExternKernel.realize_input(x) for x in (inputs, table, j, source) if x is not None]
    layout = ir.FixedLayout(inputs.get_device(), inputs.get_dtype(), [batch, channels])
    return ir.TensorBox.create(ir.ExternKernelOut(layout, given, python_kernel_name=_SUM.name()))


def builder_of(source: str, folder: Path) -> CppBuilder:
    """What builds a part's source in a folder, with TorchInductor's present options."""
    path = folder / "part.cpp"
    path.write_text(source)
    options = CppTorchOptions(vec_isa=pick_vec_isa(), aot_mode=True)
    return CppBuilder("part", str(path), options, str(folder))


class _Wrapper(CppWrapperCpu):
    expected: tuple[Tensor, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self.on_stack = 0

    # -- the frame -----------------------------------------------------------------------------------------

    def write_header(self) -> None:
        self.header.splice(_HEADER)

    def write_prefix(self) -> None:
        pass

    def finalize_prefix(self) -> None:
        pass

    def write_wrapper_decl(self) -> None:
        if V.graph.constants:
            raise NotImplementedError("constants in the graph")
        self.prefix.writeline(f'extern "C" void {ENTRY}(char* const* inputs, char* const* outputs) {{')
        for i, (name, value) in enumerate(V.graph.graph_inputs.items()):
            if isinstance(value, sympy.Expr):
                raise NotImplementedError("numbers among the inputs")
            self.prefix.writeline(f"  char* {name} = inputs[{i}];")

    def generate_return(self, output_refs: list[str]) -> None:
        if len(output_refs) != len(self.expected):
            raise NotImplementedError("other outputs than the graph has")
        outputs = zip(output_refs, V.graph.graph_outputs, self.expected, strict=True)
        for i, (ref, value, form) in enumerate(outputs):
            if isinstance(value, (ir.ShapeAsConstantBuffer, ir.NoneAsConstantBuffer)):
                raise NotImplementedError("an output that is no tensor")
            shape, strides = ([_number(n) for n in ns] for ns in (value.get_size(), value.get_stride()))
            same = (value.get_dtype(), shape) == (form.dtype, list(form.shape))
            if not same or not strided_alike(shape, strides, form.stride()):
                raise NotImplementedError("an output of another form than the graph's")
            self.wrapper_call.writeline(
                f"std::memcpy(outputs[{i}], {ref}, {form.numel() * form.element_size()});"
            )

    def generate_before_suffix(self, result: Any) -> None:
        result.writeline("}")

    def generate_end(self, result: Any) -> None:
        pass

    # -- memory --------------------------------------------------------------------------------------------

    def make_buffer_allocation(self, buffer: Any) -> str:
        name = buffer.get_name()
        elements = V.graph.get_allocation_storage_size(buffer)
        size = max(1, _number(elements) * buffer.get_dtype().itemsize)
        if self.on_stack + size <= _MOST_ON_STACK:
            self.on_stack += size
            return f"alignas({_ALIGNMENT}) char {name}_memory[{size}]; char* {name} = {name}_memory;"
        new = f"static_cast<char*>(::operator new({size}, std::align_val_t({_ALIGNMENT})))"
        return f"std::unique_ptr<char, Free> {name}_memory({new}); char* {name} = {name}_memory.get();"

    def make_buffer_free(self, buffer: Any) -> str:
        return ""

    def make_free_by_names(self, names_to_del: list[str]) -> str:
        return ""

    def make_buffer_reuse(self, old: Any, new: Any, delete_old: bool) -> str:
        return f"char* {new.get_name()} = {old.get_name()};"

    def codegen_reinterpret_view(
        self,
        data: Any,
        size: Any,
        stride: Any,
        offset: Any,
        writeline: Callable[..., None],
        dtype: torch.dtype | None = None,
    ) -> str:
        base = data
        while isinstance(base, (ir.TensorBox, ir.StorageBox)):
            base = base.data
        if not isinstance(base, ir.Buffer) or _number(base.get_layout().offset):
            raise NotImplementedError("a view of a view")
        itemsize = base.get_dtype().itemsize
        if dtype is not None and dtype.itemsize != itemsize:
            raise NotImplementedError("a view of another size")
        return f"({base.get_name()} + {_number(offset) * itemsize})"

    # -- calls ---------------------------------------------------------------------------------------------

    def _generate_kernel_call_helper(
        self, kernel_name: str, call_args: Any, *, arg_types: Any = None, **_: Any
    ) -> None:
        args = [f"({kind})({arg})" for arg, kind in zip(call_args, arg_types, strict=True)]
        self.writeline(self.wrap_kernel_call(kernel_name, args))

    def generate_extern_kernel_alloc(self, *_: Any, **__: Any) -> None:
        raise NotImplementedError("an operator called by name")

    def generate_extern_kernel_out(self, node: Any) -> None:
        name = str(node.python_kernel_name).removeprefix("extern_kernels.")
        if name == _SUM.name():
            self.writeline(_block_sum(node))
            return
        tensors, factors = _PRODUCTS.get(name, (0, 0))
        if not tensors or len(node.inputs) != tensors or node.output_view is not None:
            raise NotImplementedError("an operator called by name")
        skinny = _skinny(name, node)
        if skinny is not None:
            self.writeline(skinny)
            return
        numbers = [repr(float(node.get_kwargs_value(key))) for key in ("beta", "alpha")[:factors]]
        args = [f"{_matrix(value)}.tensor" for value in (node, *node.inputs)]
        self.writeline(f"check(aoti_torch_cpu_{name}_out({', '.join(args + numbers)}));")

    def generate_fallback_kernel(self, *_: Any, **__: Any) -> None:
        raise NotImplementedError("an operator called by name")


def _skinny(name: str, node: Any) -> str | None:
    """The product x · weightᵀ (+ bias) where x has one row, or few; None for every other product."""
    *bias, x, weight = node.inputs
    kind = _KINDS.get(node.get_dtype())
    if (
        name not in ("mm", "addmm")
        or kind is None
        or any(v.get_dtype() != node.get_dtype() for v in node.inputs)
    ):
        return None
    if bias and any(node.get_kwargs_value(key) != 1 for key in ("beta", "alpha")):
        return None
    (m, k), (_, n) = ([_number(size) for size in v.get_size()] for v in (x, weight))
    x_row, x_entry = _strides(x)
    weight_entry, weight_row = _strides(weight)
    out_row, out_entry = _strides(node)
    along_k = k == 1 or x_entry == weight_entry == 1
    if not (1 <= m <= _MOST_ROWS and n and k and along_k and (n == 1 or out_entry == 1)):
        return None
    if any([_number(size) for size in b.get_size()][-1:] != [n] or _strides(b)[-1] != 1 for b in bias):
        return None
    if any(len(b.get_size()) > 1 and _strides(b)[0] for b in bias):
        return None  # not the same for all rows

    def at(value: Any) -> str:
        return f"({kind}*)({value.codegen_reference()})"

    added = at(bias[0]) if bias else "nullptr"
    if m == 1:
        sizes = f"{n}, {torch.get_num_threads()}"
        return f"gemv<{kind}, {k}>({at(x)}, {at(weight)}, {weight_row}, {added}, {at(node)}, {sizes});"
    sizes = f"{out_row}, {n}, {k}, {torch.get_num_threads()}"
    return (
        f"skinny_gemm<{kind}, {m}>("
        f"{at(x)}, {x_row}, {at(weight)}, {weight_row}, {added}, {at(node)}, {sizes});"
    )


def _block_sum(node: Any) -> str:
    """The call of ``block_sum``."""
    inputs, table, j, *source = node.inputs
    kind = _KINDS.get(node.get_dtype())
    if kind is None or any(
        v.get_dtype() != node.get_dtype() or _strides(v)[-1] != 1 for v in (inputs, table)
    ):
        raise NotImplementedError("a sum inside a block of other numbers")
    block, batch, _ = (_number(size) for size in inputs.get_size())
    (row, batch_row, _), (table_row, _), (out_row, _) = map(_strides, (inputs, table, node))
    gather = f"(int64_t*)({source[0].codegen_reference()})" if source else "nullptr"
    rows = f"((int64_t*)({j.codegen_reference()}))[0]"
    first = f"({kind}*)({table.codegen_reference()}) + ({block} - {rows}) * {table_row}"
    sizes = f"{out_row}, {batch}, {_number(node.get_size()[1])}, {torch.get_num_threads()}"
    return (
        f"block_sum<{kind}>(({kind}*)({inputs.codegen_reference()}), {row}, {batch_row}, {first}, {table_row}, {rows}, "
        f"{gather}, ({kind}*)({node.codegen_reference()}), {sizes});"
    )


def _strides(value: Any) -> list[int]:
    return [_number(stride) for stride in value.get_stride()]


def _matrix(value: Any) -> str:
    """A tensor of torch's where a value lies."""
    dtype = str(value.get_dtype()).removeprefix("torch.")
    if dtype not in _DTYPES:
        raise NotImplementedError("a product of other numbers")
    sizes, strides = (
        f"{{{', '.join(str(_number(n)) for n in ns)}}}" for ns in (value.get_size(), value.get_stride())
    )
    return f"Matrix({value.codegen_reference()}, {sizes}, {strides}, aoti_torch_dtype_{dtype}())"


def _number(value: Any) -> int:
    if isinstance(value, sympy.Expr) and not value.is_Integer:
        raise NotImplementedError("a size that is not a number")
    return int(value)

"""Triton's interpreter for tests. `quicken` makes it take less than a third of its time, with the
same results: what it does again for every operation, though it never comes out otherwise, is done
once. `patch_bfloat16` mends bfloat16, which it stores as uint16: it multiplies the bit patterns
instead of the values, and rounds towards zero (tests/kernels/test_interpreter.py)."""

import dataclasses

import numpy as np


def quicken():
    """For the rest of this process, in which Triton was imported with TRITON_INTERPRET=1."""
    from triton.language import core
    from triton.runtime import interpreter

    # It looks for overflows of 32-bit sums and products, as compiled kernels do not and tensors of
    # a test's size cannot have any.
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)

    _patch_once_a_launch(interpreter)
    _remember_types(core)
    _remember_numpy_types(interpreter)


def _patch_once_a_launch(interpreter):
    """Each call of a function inside a kernel puts the interpreter's functions in place of Triton's
    language, where they are as long as the launch lasts."""
    in_place, replace, launch = set(), interpreter._patch_lang, interpreter.GridExecutor.__call__

    def replace_once(function):
        module = id(function.__globals__)
        if module in in_place:
            return interpreter._LangPatchScope()  # nothing to put back
        in_place.add(module)
        return replace(function)

    def launch_afresh(self, *given, **options):
        in_place.clear()
        return launch(self, *given, **options)

    interpreter._patch_lang = replace_once
    interpreter.GridExecutor.__call__ = launch_afresh


def _remember_types(core):
    """A block's type is checked and named by its elements and shape alone; a tensor's shape, a
    tuple of constants, follows from its type's."""
    new_type, new_tensor = core.block_type.__init__, core.tensor.__init__
    types, shapes = {}, {}

    def block_type(self, element_ty, shape):
        sides = (side.value if isinstance(side, core.constexpr) else side for side in shape)
        key = element_ty.name, *sides
        if key not in types:
            new_type(self, element_ty, shape)
            types[key] = vars(self).copy()
        else:
            vars(self).update(types[key])

    def tensor(self, handle, type):
        key = tuple(type.shape.values) if type.is_block() else ()
        if key not in shapes:
            new_tensor(self, handle, type)
            shapes[key] = self.shape, self.numel
        else:
            self.handle, self.type, self.dtype = handle, type, type.scalar
            self.shape, self.numel = shapes[key]

    core.block_type.__init__ = block_type
    core.tensor.__init__ = tensor


def _remember_numpy_types(interpreter):
    """Each question for the NumPy type of a Triton type makes the table of all of them."""
    find, known = interpreter._get_np_dtype, {}

    def found(type):
        if type.name not in known:
            known[type.name] = find(type)
        return known[type.name]

    interpreter._get_np_dtype = found


def patch_bfloat16():
    """Products of bfloat16 in float32, and PyTorch's rounding (to nearest, ties to even)."""
    import torch
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    dot, cast = builder.create_dot, builder.cast_impl

    def wide(operand):
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        bits = operand.data.astype(np.uint32) << 16
        return handle(bits.view(np.float32), tl.float32)

    def create_dot(self, a, b, d, *rest):
        return dot(self, wide(a), wide(b), d, *rest)

    def cast_impl(self, src, dst_type):
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            values = torch.from_numpy(np.ascontiguousarray(src.data)).bfloat16()
            return handle(values.view(torch.uint16).numpy(), tl.bfloat16)
        return cast(self, src, dst_type)

    builder.create_dot = create_dot
    builder.cast_impl = cast_impl
    for name in ("create_fp_ext", "create_fp_trunc"):
        setattr(builder, name, lambda self, src, dst_type: cast_impl(self, src, dst_type))

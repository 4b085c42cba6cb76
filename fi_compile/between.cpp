// What a step does between its compiled parts, without Python; see extension.py, which builds this, and its
// callers, which do the same in Python where it cannot be built.

#include <Python.h>

#include <ATen/EmptyTensor.h>
#include <ATen/core/TensorBase.h>
#include <torch/csrc/Export.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <vector>

// torch/csrc/autograd/python_variable.h, which takes fifteen seconds to compile; `works` in extension.py checks it.
struct THPVariable {
  PyObject_HEAD
  at::TensorBase cdata;
};
TORCH_PYTHON_API extern PyObject* THPVariableClass;
TORCH_PYTHON_API extern PyObject* ParameterClass;
TORCH_PYTHON_API PyObject* THPVariable_Wrap(const at::TensorBase& var);

namespace {

// How a tensor lies in memory.
struct Form {
  char* data;
  std::vector<int64_t> sizes, strides;
  at::ScalarType dtype;
};

struct PythonError {};  // an exception is set already

// Runs what may throw; an exception of C++ becomes one of Python.
template <typename F>
PyObject* guarded(F&& body) noexcept {
  try {
    return body();
  } catch (const PythonError&) {
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  } catch (...) {
    PyErr_SetString(PyExc_RuntimeError, "unknown error");
  }
  return nullptr;
}

// A tensor or a parameter, and no subclass.
bool is_tensor(PyObject* object) {
  const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  return type == THPVariableClass || type == ParameterClass;
}

// An ordinary tensor in this machine's memory: no subclass, no wrapper, nothing lazy.
bool is_plain(PyObject* object) {
  if (!is_tensor(object)) return false;
  const auto& tensor = reinterpret_cast<THPVariable*>(object)->cdata;
  return tensor.defined() && tensor.has_storage() && tensor.device().is_cpu() && !tensor.is_conj() &&
      !tensor.is_neg();
}

const at::TensorBase& unpack(PyObject* object) {
  if (!is_plain(object)) throw std::runtime_error("expected an ordinary tensor on the CPU");
  return reinterpret_cast<THPVariable*>(object)->cdata;
}

PyObject* item(PyObject* tuple, Py_ssize_t i) {
  if (!PyTuple_CheckExact(tuple) || i < 0 || i >= PyTuple_GET_SIZE(tuple)) {
    throw std::runtime_error("expected a longer tuple");
  }
  return PyTuple_GET_ITEM(tuple, i);
}

int64_t integer(PyObject* object) {
  const int64_t value = PyLong_AsLongLong(object);
  if (value == -1 && PyErr_Occurred()) throw PythonError();
  return value;
}

Form form_of(const at::TensorBase& tensor) {
  return {
      static_cast<char*>(tensor.data_ptr()), tensor.sizes().vec(), tensor.strides().vec(), tensor.scalar_type()};
}

// Whether two forms lie in memory alike; strides of single entries mean nothing.
bool alike(const Form& a, const Form& b) {
  bool same = a.sizes == b.sizes && a.dtype == b.dtype;
  for (size_t i = 0; same && i < a.sizes.size(); ++i) same = a.sizes[i] == 1 || a.strides[i] == b.strides[i];
  return same || (a.dtype == b.dtype && a.sizes == b.sizes && std::count(a.sizes.begin(), a.sizes.end(), 0));
}

// -- Chain -----------------------------------------------------------------------------------------------------

// A compiled part: the function that pointers.py writes. Its library stays loaded.
using Part = void (*)(char* const* inputs, char* const* outputs);

struct Call {
  Part part;
  std::vector<size_t> inputs, outputs;  // numbers of values
  std::vector<char*> given, made;
};

struct Plan {
  size_t known = 0;  // the first values are tensors that exist, the others are made by calls
  std::vector<Form> values;
  std::vector<c10::Storage> storages;    // what inputs lie in, so that no other memory gets their addresses
  std::vector<at::TensorBase> buffers;   // of made values that stay inside
  std::vector<size_t> fed, outputs;
  std::vector<Call> calls;
};

struct Chain {
  PyObject_HEAD
  PyObject* tensors;  // tuple: an example of each value; of the inputs, themselves
  Plan* plan;
};

std::vector<size_t> numbers(PyObject* tuple, size_t end) {
  std::vector<size_t> found;
  for (Py_ssize_t i = 0; i < PyTuple_Size(tuple); ++i) {
    const int64_t value = integer(item(tuple, i));
    if (value < 0 || static_cast<size_t>(value) >= end) throw std::runtime_error("no such value");
    found.push_back(static_cast<size_t>(value));
  }
  if (PyErr_Occurred()) throw PythonError();
  return found;
}

std::unique_ptr<Plan> planned(PyObject* tensors, size_t known, PyObject* fed, PyObject* calls, PyObject* outputs) {
  auto plan = std::make_unique<Plan>();
  const auto count = static_cast<size_t>(PyTuple_Size(tensors));
  if (PyErr_Occurred() || known > count) throw std::runtime_error("expected a tuple of tensors");
  plan->known = known;
  for (size_t i = 0; i < count; ++i) {
    const auto& tensor = unpack(item(tensors, static_cast<Py_ssize_t>(i)));
    plan->values.push_back(form_of(tensor));
    if (i < known) {
      plan->storages.push_back(tensor.storage());
    } else if (!tensor.is_non_overlapping_and_dense()) {
      throw std::runtime_error("a value with gaps in memory");
    } else {
      plan->buffers.push_back(tensor);
    }
  }
  plan->fed = numbers(fed, known);
  plan->outputs = numbers(outputs, count);
  for (size_t out : plan->outputs) {
    if (out < known) throw std::runtime_error("an output that is an input");
  }
  for (Py_ssize_t i = 0; i < PyTuple_Size(calls); ++i) {
    PyObject* entry = item(calls, i);
    void* address = PyLong_AsVoidPtr(item(entry, 0));
    if (!address) throw std::runtime_error("expected the address of a compiled part");
    Call call;
    call.part = reinterpret_cast<Part>(address);
    call.inputs = numbers(item(entry, 1), count);
    call.outputs = numbers(item(entry, 2), count);
    call.given.resize(call.inputs.size());
    call.made.resize(call.outputs.size());
    plan->calls.push_back(std::move(call));
  }
  if (PyErr_Occurred()) throw PythonError();
  return plan;
}

// Takes notice of where a tensor lies now: `.data` may have been exchanged.
void locate(Plan& plan, size_t value, const at::TensorBase& tensor) {
  const Form found = form_of(tensor);
  if (!alike(found, plan.values[value])) {
    throw std::runtime_error("a tensor that the step reads has another shape or dtype than it was compiled for");
  }
  plan.values[value].data = found.data;
  plan.storages[value] = tensor.storage();
}

void run_calls(Plan& plan) {
  for (auto& call : plan.calls) {
    for (size_t i = 0; i < call.inputs.size(); ++i) call.given[i] = plan.values[call.inputs[i]].data;
    for (size_t i = 0; i < call.outputs.size(); ++i) call.made[i] = plan.values[call.outputs[i]].data;
    call.part(call.given.data(), call.made.data());
  }
}

PyObject* chain_new(PyTypeObject* type, PyObject* args, PyObject*) {
  return guarded([&]() -> PyObject* {
    PyObject *tensors, *fed, *calls, *outputs;
    Py_ssize_t known;
    if (!PyArg_ParseTuple(
            args, "O!nO!O!O!", &PyTuple_Type, &tensors, &known, &PyTuple_Type, &fed, &PyTuple_Type, &calls,
            &PyTuple_Type, &outputs)) {
      return nullptr;
    }
    auto plan = planned(tensors, static_cast<size_t>(known), fed, calls, outputs);
    auto* self = reinterpret_cast<Chain*>(type->tp_alloc(type, 0));
    if (self) {
      self->tensors = Py_NewRef(tensors);
      self->plan = plan.release();
    }
    return reinterpret_cast<PyObject*>(self);
  });
}

PyObject* chain_call(PyObject* object, PyObject* args, PyObject* kwargs) {
  return guarded([&]() -> PyObject* {
    auto* self = reinterpret_cast<Chain*>(object);
    Plan& plan = *self->plan;
    if (static_cast<size_t>(PyTuple_GET_SIZE(args)) != plan.fed.size() || (kwargs && PyDict_Size(kwargs))) {
      throw std::runtime_error("a chain is called with as many tensors as it is fed");
    }
    for (size_t i = 0; i < plan.known; ++i) {
      const auto& tensor = unpack(PyTuple_GET_ITEM(self->tensors, static_cast<Py_ssize_t>(i)));
      const Form& form = plan.values[i];
      const bool there = tensor.data_ptr() == form.data && tensor.sizes().equals(form.sizes) &&
          tensor.strides().equals(form.strides) && tensor.scalar_type() == form.dtype;
      if (!there) locate(plan, i, tensor);
    }
    for (size_t i = 0; i < plan.fed.size(); ++i) {
      locate(plan, plan.fed[i], unpack(PyTuple_GET_ITEM(args, static_cast<Py_ssize_t>(i))));
    }
    std::vector<at::TensorBase> outputs;
    for (size_t value : plan.outputs) {
      const auto before = std::find(plan.outputs.begin(), plan.outputs.end(), value) - plan.outputs.begin();
      if (static_cast<size_t>(before) < outputs.size()) {
        outputs.push_back(outputs[static_cast<size_t>(before)]);
        continue;
      }
      const Form& form = plan.values[value];
      outputs.push_back(at::detail::empty_strided_cpu(form.sizes, form.strides, form.dtype));
      plan.values[value].data = static_cast<char*>(outputs.back().data_ptr());
    }
    PyThreadState* thread = PyEval_SaveThread();
    try {
      run_calls(plan);
    } catch (...) {
      PyEval_RestoreThread(thread);
      throw;
    }
    PyEval_RestoreThread(thread);
    PyObject* list = PyList_New(static_cast<Py_ssize_t>(outputs.size()));
    if (!list) throw PythonError();
    for (size_t i = 0; i < outputs.size(); ++i) {
      PyObject* tensor = THPVariable_Wrap(outputs[i]);
      if (!tensor) {
        Py_DECREF(list);
        throw PythonError();
      }
      PyList_SET_ITEM(list, static_cast<Py_ssize_t>(i), tensor);
    }
    return list;
  });
}

int chain_traverse(PyObject* object, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(object));
  Py_VISIT(reinterpret_cast<Chain*>(object)->tensors);
  return 0;
}

void chain_dealloc(PyObject* object) {
  auto* self = reinterpret_cast<Chain*>(object);
  PyTypeObject* type = Py_TYPE(object);
  PyObject_GC_UnTrack(object);
  Py_CLEAR(self->tensors);
  delete self->plan;
  type->tp_free(object);
  Py_DECREF(type);
}

PyType_Slot chain_slots[] = {
    {Py_tp_doc, const_cast<char*>("Chain(tensors, known, fed, calls, outputs): compiled parts, one after another.")},
    {Py_tp_new, reinterpret_cast<void*>(chain_new)},
    {Py_tp_call, reinterpret_cast<void*>(chain_call)},
    {Py_tp_traverse, reinterpret_cast<void*>(chain_traverse)},
    {Py_tp_dealloc, reinterpret_cast<void*>(chain_dealloc)},
    {0, nullptr},
};

PyType_Spec chain_spec = {
    "between.Chain", sizeof(Chain), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC, chain_slots};

// -- Watch -----------------------------------------------------------------------------------------------------

// A step leaves nothing of the model's objects in the caches. What is read of many of them is asked for at once: one
// after another, each would be waited for.
void fetch(const void* address, size_t bytes = 1) {
  for (size_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(address) + i);
}

void fetch(PyObject* const* objects, size_t count) {
  std::vector<at::TensorImpl*> tensors;
  for (size_t i = 0; i < count; ++i) fetch(objects[i]);
  for (size_t i = 0; i < count; ++i) {
    if (!is_tensor(objects[i])) continue;
    tensors.push_back(reinterpret_cast<THPVariable*>(objects[i])->cdata.unsafeGetTensorImpl());
    fetch(tensors.back(), sizeof(at::TensorImpl));
  }
  for (auto* tensor : tensors) {
    fetch(tensor->unsafe_storage().unsafeGetStorageImpl(), sizeof(c10::StorageImpl));
    fetch(*reinterpret_cast<void* const*>(&tensor->version_counter()));
  }
}

// Changes whenever the dictionary does; 0 where that is not kept.
uint64_t tag_of(PyObject* dict) {
#if PY_VERSION_HEX < 0x030C0000
  if (PyDict_Check(dict)) return reinterpret_cast<PyDictObject*>(dict)->ma_version_tag;
#endif
  return 0;
}

struct Known {
  PyObject* tensor;
  int64_t version;
  std::vector<int64_t> layout;  // where its data lie, its sizes, its strides; nothing of a subclass
};

struct Held {
  std::vector<PyObject*> tables;  // each once
  std::vector<uint64_t> tags;     // of tables, when they were last looked through
  std::vector<Known> known;
};

struct Watch {
  PyObject_HEAD
  PyObject *owners, *keys, *objects, *tensors;  // tuples
  Held* held;
};

bool lies_so(const at::TensorBase& tensor, const std::vector<int64_t>& layout) {
  const auto dims = static_cast<size_t>(tensor.dim());
  return tensor.has_storage() && layout.size() == 1 + 2 * dims &&
      reinterpret_cast<int64_t>(tensor.const_data_ptr()) == layout[0] &&
      std::equal(tensor.sizes().begin(), tensor.sizes().end(), layout.begin() + 1) &&
      std::equal(tensor.strides().begin(), tensor.strides().end(), layout.begin() + 1 + tensor.dim());
}

// Whether a tensor has the version that it had, and lies where and as it lay; of a subclass, the version alone.
bool same(const Known& known) {
  if (is_tensor(known.tensor)) {
    const auto& tensor = reinterpret_cast<THPVariable*>(known.tensor)->cdata;
    const auto version = tensor.unsafeGetTensorImpl()->version_counter().current_version();
    if (static_cast<int64_t>(version) != known.version) return false;
    return known.layout.empty() || lies_so(tensor, known.layout);
  }
  PyObject* version = PyObject_GetAttrString(known.tensor, "_version");
  if (!version) throw PythonError();
  const int64_t found = PyLong_AsLongLong(version);
  Py_DECREF(version);
  if (found == -1 && PyErr_Occurred()) throw PythonError();
  return found == known.version;
}

// Whether every table holds the objects it held; looked through only where it may not.
bool hold_the_same(Watch* self) {
  Held& held = *self->held;
  for (PyObject* table : held.tables) fetch(table, sizeof(PyDictObject));
  bool certain = true;
  for (size_t i = 0; certain && i < held.tables.size(); ++i) {
    certain = held.tags[i] && tag_of(held.tables[i]) == held.tags[i];
  }
  if (certain) return true;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(self->owners); ++i) {
    PyObject* found = PyDict_GetItemWithError(PyTuple_GET_ITEM(self->owners, i), PyTuple_GET_ITEM(self->keys, i));
    if (!found && PyErr_Occurred()) throw PythonError();
    if (found != PyTuple_GET_ITEM(self->objects, i)) return false;
  }
  for (size_t i = 0; i < held.tables.size(); ++i) held.tags[i] = tag_of(held.tables[i]);
  return true;
}

// Watch(owners, keys, objects, tensors, versions, layouts): six tuples, the first three of one length, the others too
PyObject* watch_new(PyTypeObject* type, PyObject* args, PyObject*) {
  return guarded([&]() -> PyObject* {
    PyObject* tuples[6];
    if (!PyArg_ParseTuple(
            args, "O!O!O!O!O!O!", &PyTuple_Type, &tuples[0], &PyTuple_Type, &tuples[1], &PyTuple_Type, &tuples[2],
            &PyTuple_Type, &tuples[3], &PyTuple_Type, &tuples[4], &PyTuple_Type, &tuples[5])) {
      return nullptr;
    }
    for (int i = 0; i < 6; ++i) {
      if (PyTuple_GET_SIZE(tuples[i]) != PyTuple_GET_SIZE(tuples[i / 3 * 3])) {
        throw std::runtime_error("expected tuples of one length");
      }
    }
    auto held = std::make_unique<Held>();
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tuples[0]); ++i) {
      PyObject* table = PyTuple_GET_ITEM(tuples[0], i);
      if (std::find(held->tables.begin(), held->tables.end(), table) == held->tables.end()) {
        held->tables.push_back(table);
        held->tags.push_back(0);
      }
    }
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tuples[3]); ++i) {
      PyObject* layout = item(tuples[5], i);
      std::vector<int64_t> numbers;
      for (Py_ssize_t k = 0; k < PyTuple_Size(layout); ++k) numbers.push_back(integer(item(layout, k)));
      if (PyErr_Occurred()) throw PythonError();
      held->known.push_back({item(tuples[3], i), integer(item(tuples[4], i)), std::move(numbers)});
    }
    auto* self = reinterpret_cast<Watch*>(type->tp_alloc(type, 0));
    if (self) {
      self->owners = Py_NewRef(tuples[0]);
      self->keys = Py_NewRef(tuples[1]);
      self->objects = Py_NewRef(tuples[2]);
      self->tensors = Py_NewRef(tuples[3]);
      self->held = held.release();
    }
    return reinterpret_cast<PyObject*>(self);
  });
}

PyObject* watch_call(PyObject* object, PyObject*, PyObject*) {
  return guarded([&]() -> PyObject* {
    auto* self = reinterpret_cast<Watch*>(object);
    if (!hold_the_same(self)) Py_RETURN_FALSE;
    fetch(reinterpret_cast<PyTupleObject*>(self->tensors)->ob_item, self->held->known.size());
    for (const auto& known : self->held->known) {
      if (!same(known)) Py_RETURN_FALSE;
    }
    Py_RETURN_TRUE;
  });
}

int watch_traverse(PyObject* object, visitproc visit, void* arg) {
  auto* self = reinterpret_cast<Watch*>(object);
  Py_VISIT(Py_TYPE(object));
  Py_VISIT(self->owners);
  Py_VISIT(self->keys);
  Py_VISIT(self->objects);
  Py_VISIT(self->tensors);
  return 0;
}

void watch_dealloc(PyObject* object) {
  auto* self = reinterpret_cast<Watch*>(object);
  PyTypeObject* type = Py_TYPE(object);
  PyObject_GC_UnTrack(object);
  for (PyObject** tuple : {&self->owners, &self->keys, &self->objects, &self->tensors}) Py_CLEAR(*tuple);
  delete self->held;
  type->tp_free(object);
  Py_DECREF(type);
}

PyType_Slot watch_slots[] = {
    {Py_tp_doc, const_cast<char*>("Watch(owners, keys, objects, tensors, versions, layouts): whether all is as it was.")},
    {Py_tp_new, reinterpret_cast<void*>(watch_new)},
    {Py_tp_call, reinterpret_cast<void*>(watch_call)},
    {Py_tp_traverse, reinterpret_cast<void*>(watch_traverse)},
    {Py_tp_dealloc, reinterpret_cast<void*>(watch_dealloc)},
    {0, nullptr},
};

PyType_Spec watch_spec = {
    "between.Watch", sizeof(Watch), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC, watch_slots};

// -- functions -------------------------------------------------------------------------------------------------

// places(values, tensors, numbers): bytes that are equal where the values at the places `tensors` are the same ordinary
// tensors laid out as they were where they were, and those at `numbers` ordinary tensors of the same one number
PyObject* places(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return guarded([&]() -> PyObject* {
    if (count != 3) throw std::runtime_error("places takes three tuples");
    std::vector<PyObject*> objects;
    for (Py_ssize_t which = 1; which < 3; ++which) {
      for (Py_ssize_t i = 0; i < PyTuple_Size(args[which]); ++i) {
        objects.push_back(item(args[0], integer(item(args[which], i))));
      }
    }
    if (PyErr_Occurred()) throw PythonError();
    fetch(objects.data(), objects.size());
    const auto tensors = static_cast<size_t>(PyTuple_GET_SIZE(args[1]));
    std::vector<std::intptr_t> found;
    for (size_t i = 0; i < objects.size(); ++i) {
      const auto& tensor = unpack(objects[i]);
      if (i < tensors) {
        found.push_back(reinterpret_cast<std::intptr_t>(objects[i]));
        found.push_back(reinterpret_cast<std::intptr_t>(tensor.const_data_ptr()));
      } else {
        if (tensor.numel() != 1 || tensor.nbytes() > sizeof(std::intptr_t)) throw std::runtime_error("not one number");
        found.push_back(0);
        std::memcpy(&found.back(), tensor.const_data_ptr(), tensor.nbytes());
      }
      found.push_back(static_cast<std::intptr_t>(tensor.scalar_type()));
      found.push_back(tensor.dim());
      found.insert(found.end(), tensor.sizes().begin(), tensor.sizes().end());
      found.insert(found.end(), tensor.strides().begin(), tensor.strides().end());
    }
    const auto* bytes = reinterpret_cast<const char*>(found.data());
    return PyBytes_FromStringAndSize(bytes, static_cast<Py_ssize_t>(found.size() * sizeof(std::intptr_t)));
  });
}

// place(token, row, sequence, position, ids)
PyObject* place(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return guarded([&]() -> PyObject* {
    if (count != 5) throw std::runtime_error("place takes five arguments");
    if (!is_plain(args[0]) || !is_plain(args[1]) || !is_plain(args[2])) Py_RETURN_FALSE;
    const auto& token = unpack(args[0]);
    const auto& row = unpack(args[1]);
    const auto& sequence = unpack(args[2]);
    const int64_t position = integer(args[3]), ids = integer(args[4]);
    const auto dims = row.dim();
    if (token.dim() != dims - 1 || sequence.dim() != dims || dims < 2 || token.scalar_type() != row.scalar_type() ||
        token.scalar_type() != sequence.scalar_type() || !token.is_contiguous() || !row.is_contiguous() ||
        !sequence.is_contiguous() || row.size(1) != 1 || position < 0 || position >= sequence.size(1)) {
      Py_RETURN_FALSE;
    }
    for (int64_t i = 0; i < dims - 1; ++i) {
      const int64_t size = token.size(i), in_row = i ? i + 1 : 0;
      if (size != row.size(in_row) || size != sequence.size(in_row)) Py_RETURN_FALSE;
    }
    const int64_t batch = token.size(0);
    if (ids > 0) {
      if (token.scalar_type() != at::kLong) Py_RETURN_FALSE;
      const auto* values = static_cast<const int64_t*>(token.const_data_ptr());
      for (int64_t b = 0; b < token.numel(); ++b) {
        if (values[b] < 0 || values[b] >= ids) Py_RETURN_FALSE;
      }
    }
    if (token.numel() == 0) Py_RETURN_FALSE;
    const size_t bytes = token.nbytes(), one = bytes / static_cast<size_t>(batch);
    const auto* source = static_cast<const char*>(token.const_data_ptr());
    std::memcpy(row.data_ptr(), source, bytes);
    auto* kept = static_cast<char*>(sequence.data_ptr());
    for (int64_t b = 0; b < batch; ++b) {
      std::memcpy(kept + one * static_cast<size_t>(b * sequence.size(1) + position), source + one * b, one);
    }
    Py_RETURN_TRUE;
  });
}

// probe(tensor): its version and where its data are, as this file reads them.
PyObject* probe(PyObject*, PyObject* object) {
  return guarded([&]() -> PyObject* {
    const auto& tensor = unpack(object);
    return Py_BuildValue(
        "LK", static_cast<long long>(tensor.unsafeGetTensorImpl()->version_counter().current_version()),
        reinterpret_cast<unsigned long long>(tensor.data_ptr()));
  });
}

PyMethodDef functions[] = {
    {"places", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(places)), METH_FASTCALL, nullptr},
    {"place", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(place)), METH_FASTCALL, nullptr},
    {"probe", probe, METH_O, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "between", nullptr, -1, functions};

}  // namespace

PyMODINIT_FUNC PyInit_between(void) {
  PyObject* made = PyModule_Create(&module);
  if (!made) return nullptr;
  for (auto* spec : {&chain_spec, &watch_spec}) {
    PyObject* type = PyType_FromSpec(spec);
    const bool added = type && PyModule_AddType(made, reinterpret_cast<PyTypeObject*>(type)) == 0;
    Py_XDECREF(type);
    if (!added) {
      Py_DECREF(made);
      return nullptr;
    }
  }
  return made;
}

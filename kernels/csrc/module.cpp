// Python's door to the CPU kernel: raw addresses in, nothing of torch. kernels/cpu*.py
// have checked shapes, types and strides. The interpreter lock is released while work is done.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <new>

#include "driver.h"

namespace {

using namespace mpsae;
using Address = unsigned long long;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(static_cast<uintptr_t>(address));
}

const Functions* functions_named(const char* name) {
  const Functions* f = functions_for(name);
  if (!f) PyErr_Format(PyExc_ValueError, "this CPU has no instruction set '%s'", name);
  return f;
}

// Run work without the interpreter lock; false with MemoryError set where memory ran out.
template <class Work>
bool unlocked(Work work) {
  bool fits = true;
  Py_BEGIN_ALLOW_THREADS;
  try {
    work();
  } catch (const std::bad_alloc&) {
    fits = false;
  }
  Py_END_ALLOW_THREADS;
  if (!fits) PyErr_NoMemory();
  return fits;
}

PyObject* none_if(bool ok) {
  if (!ok) return nullptr;
  Py_RETURN_NONE;
}

// The tuple that Task.problem in kernels/cpu_methods.py makes.
bool read_problem(PyObject* tuple, Problem* p) {
  Address x, dictionary, encoder, bias, entries, scale, diagonal, error, packed, k_rows, slices;
  Address indices, values, residual, steps, rescored;
  long long B, d, n, k, stride;
  int stop_on_repeat, allow_repeats, certified;
  if (!PyArg_ParseTuple(tuple, "KKKKLLLLKKKKLKddddKKddipppKKKKK", &x, &dictionary, &encoder,
                        &bias, &B, &d, &n, &k, &entries, &scale, &diagonal, &error, &stride,
                        &packed, &p->encoder_norm, &p->dictionary_norm, &p->packed_error,
                        &p->bias_size, &k_rows, &slices, &p->residual_threshold,
                        &p->correlation_threshold, &p->select, &stop_on_repeat, &allow_repeats,
                        &certified, &indices, &values, &residual, &steps, &rescored))
    return false;
  p->x = at<const float>(x);
  p->dictionary = at<const float>(dictionary);
  p->encoder = at<const float>(encoder);
  p->bias = at<const float>(bias);
  p->B = B, p->d = d, p->n = n, p->k = k;
  p->entries = at<const void>(entries);
  p->scale = at<const float>(scale);
  p->diagonal = at<const float>(diagonal);
  p->error = at<const float>(error);
  p->stride = stride;
  p->packed = at<const uint32_t>(packed);
  p->k_rows = at<const int64_t>(k_rows);
  p->slices = at<const int64_t>(slices);
  p->stop_on_repeat = stop_on_repeat, p->allow_repeats = allow_repeats, p->certified = certified;
  p->indices = at<int64_t>(indices);
  p->values = at<float>(values);
  p->residual = at<float>(residual);
  p->steps = at<int64_t>(steps);
  p->rescored = at<int64_t>(rescored);
  return true;
}

PyObject* describe(PyObject*, PyObject* args) {
  const char* isa;
  if (!PyArg_ParseTuple(args, "s", &isa)) return nullptr;
  const Functions* f = functions_named(isa);
  return f ? Py_BuildValue("sO", f->name, has_bf16() ? Py_True : Py_False) : nullptr;
}

PyObject* pack(PyObject*, PyObject* args) {
  Address encoder, packed;
  long long n, d, threads;
  if (!PyArg_ParseTuple(args, "KLLKL", &encoder, &n, &d, &packed, &threads)) return nullptr;
  double error = 0;
  const bool ok = unlocked(
      [&] { error = pack_encoder(at<const float>(encoder), n, d, at<uint32_t>(packed), threads); });
  return ok ? PyFloat_FromDouble(error) : nullptr;
}

PyObject* norm(PyObject*, PyObject* args) {
  Address rows;
  long long n, d, threads;
  const char* isa;
  if (!PyArg_ParseTuple(args, "KLLLs", &rows, &n, &d, &threads, &isa)) return nullptr;
  const Functions* f = functions_named(isa);
  if (!f) return nullptr;
  double size = 0;
  const bool ok =
      unlocked([&] { size = largest_norm(at<const float>(rows), n, d, threads, *f); });
  return ok ? PyFloat_FromDouble(size) : nullptr;
}

PyObject* quantise(PyObject*, PyObject* args) {
  Address product, atoms, rounding, entries, scale, diagonal, error;
  long long rows, n, product_stride, stride, threads;
  const char* isa;
  if (!PyArg_ParseTuple(args, "KLLLKKKLKKKLs", &product, &rows, &n, &product_stride, &atoms,
                        &rounding, &entries, &stride, &scale, &diagonal, &error, &threads, &isa))
    return nullptr;
  const Functions* f = functions_named(isa);
  if (!f) return nullptr;
  return none_if(unlocked([&] {
    quantise_rows(at<const float>(product), rows, n, product_stride, at<const int64_t>(atoms),
                  at<const double>(rounding), at<int16_t>(entries), stride, at<float>(scale),
                  at<float>(diagonal), at<float>(error), threads, *f);
  }));
}

PyObject* pursue(PyObject*, PyObject* args) {
  PyObject* tuple;
  Address product;
  long long product_stride, block_rows, threads;
  int half;
  const char* isa;
  Problem p;
  if (!PyArg_ParseTuple(args, "O!pKLLLs", &PyTuple_Type, &tuple, &half, &product,
                        &product_stride, &block_rows, &threads, &isa) ||
      !read_problem(tuple, &p))
    return nullptr;
  const Functions* f = functions_named(isa);
  if (!f) return nullptr;
  return none_if(unlocked([&] {
    pursue_gram(p, {half != 0, threads, block_rows, at<const float>(product), product_stride}, *f);
  }));
}

PyObject* stream(PyObject*, PyObject* args) {
  PyObject* tuple;
  long long block_rows, threads;
  const char* isa;
  Problem p;
  if (!PyArg_ParseTuple(args, "O!LLs", &PyTuple_Type, &tuple, &block_rows, &threads, &isa) ||
      !read_problem(tuple, &p))
    return nullptr;
  const Functions* f = functions_named(isa);
  if (!f) return nullptr;
  return none_if(unlocked([&] { pursue_stream(p, threads, block_rows, *f); }));
}

const char* const SESSION = "mpsae.kernels._cpu.session";

void close_session(PyObject* capsule) {
  delete static_cast<Session*>(PyCapsule_GetPointer(capsule, SESSION));
}

PyObject* session(PyObject*, PyObject* args) {
  PyObject* tuple;
  Address product;
  long long stride, threads;
  int low;
  const char* isa;
  Problem p;
  if (!PyArg_ParseTuple(args, "O!KLpLs", &PyTuple_Type, &tuple, &product, &stride, &low,
                        &threads, &isa) ||
      !read_problem(tuple, &p))
    return nullptr;
  const Functions* f = functions_named(isa);
  if (!f) return nullptr;
  Session* made = nullptr;
  if (!unlocked(
          [&] { made = new Session(p, *f, at<float>(product), stride, threads, low != 0); }))
    return nullptr;
  PyObject* capsule = PyCapsule_New(made, SESSION, close_session);
  if (!capsule) delete made;
  return capsule;
}

PyObject* choose(PyObject*, PyObject* args) {
  PyObject* capsule;
  Address chosen;
  if (!PyArg_ParseTuple(args, "OK", &capsule, &chosen)) return nullptr;
  Session* held = static_cast<Session*>(PyCapsule_GetPointer(capsule, SESSION));
  if (!held) return nullptr;
  int64_t live = 0;
  if (!unlocked([&] { live = held->choose(at<int64_t>(chosen)); })) return nullptr;
  return PyLong_FromLongLong(live);
}

PyObject* subtract(PyObject*, PyObject* args) {
  PyObject* capsule;
  Address entries, scale, diagonal, error, slots;
  long long stride;
  if (!PyArg_ParseTuple(args, "OKLKKKK", &capsule, &entries, &stride, &scale, &diagonal, &error,
                        &slots))
    return nullptr;
  Session* held = static_cast<Session*>(PyCapsule_GetPointer(capsule, SESSION));
  if (!held) return nullptr;
  return none_if(unlocked([&] {
    held->subtract(at<const int16_t>(entries), stride, at<const float>(scale),
                   at<const float>(diagonal), at<const float>(error), at<const int64_t>(slots));
  }));
}

PyObject* renew(PyObject*, PyObject* args) {
  PyObject* capsule;
  if (!PyArg_ParseTuple(args, "O", &capsule)) return nullptr;
  Session* held = static_cast<Session*>(PyCapsule_GetPointer(capsule, SESSION));
  if (!held) return nullptr;
  return none_if(unlocked([&] { held->renew(); }));
}

PyObject* backward(PyObject*, PyObject* args) {
  Address dictionary, encoder, indices, values, residual, steps, grad_residual, grad_values;
  Address share, grad_x, grad_dictionary, grad_encoder, grad_bias;
  long long B, d, n, k, threads;
  int relu, detach, tied;
  const char* isa;
  if (!PyArg_ParseTuple(args, "KKKKKKKKLLLLpppKKKKKLs", &dictionary, &encoder, &indices, &values,
                        &residual, &steps, &grad_residual, &grad_values, &B, &d, &n, &k, &relu,
                        &detach, &tied, &share, &grad_x, &grad_dictionary, &grad_encoder,
                        &grad_bias, &threads, &isa))
    return nullptr;
  const Functions* f = functions_named(isa);
  if (!f) return nullptr;
  const Backward q = {at<const float>(dictionary),
                      at<const float>(encoder),
                      at<const int64_t>(indices),
                      at<const float>(values),
                      at<const float>(residual),
                      at<const int64_t>(steps),
                      at<const float>(grad_residual),
                      at<const float>(grad_values),
                      B,
                      d,
                      n,
                      k,
                      relu != 0,
                      detach != 0,
                      tied != 0,
                      at<float>(share),
                      at<float>(grad_x),
                      at<float>(grad_dictionary),
                      at<float>(grad_encoder),
                      at<float>(grad_bias)};
  return none_if(unlocked([&] { reverse(q, threads, *f); }));
}

// The three sums over pairs take the same arguments: the factor that is made stands last.
template <void (*Sum)(const Sparse&, float*, int64_t, const Functions&)>
PyObject* sparse(PyObject*, PyObject* args) {
  Address indices, values, x, dictionary, out;
  long long B, d, n, k, threads;
  const char* isa;
  if (!PyArg_ParseTuple(args, "KKKKLLLLKLs", &indices, &values, &x, &dictionary, &B, &d, &n, &k,
                        &out, &threads, &isa))
    return nullptr;
  const Functions* f = functions_named(isa);
  if (!f) return nullptr;
  const Sparse q = {at<const int64_t>(indices),
                    at<const float>(values),
                    at<const float>(x),
                    at<const float>(dictionary),
                    B,
                    d,
                    n,
                    k};
  return none_if(unlocked([&] { Sum(q, at<float>(out), threads, *f); }));
}

PyObject* penalise(PyObject*, PyObject* args) {
  Address indices, live, dictionary, sum, gradient;
  long long B, d, n, k, threads;
  const char* isa;
  if (!PyArg_ParseTuple(args, "KKKLLLLKKLs", &indices, &live, &dictionary, &B, &d, &n, &k, &sum,
                        &gradient, &threads, &isa))
    return nullptr;
  const Functions* f = functions_named(isa);
  if (!f) return nullptr;
  const Sparse q = {at<const int64_t>(indices), at<const float>(live), nullptr,
                    at<const float>(dictionary), B, d, n, k};
  return none_if(
      unlocked([&] { coselection(q, at<double>(sum), at<float>(gradient), threads, *f); }));
}

PyObject* find_largest(PyObject*, PyObject* args) {
  Address rows, indices, values;
  long long B, n, k, threads;
  const char* isa;
  if (!PyArg_ParseTuple(args, "KLLLKKLs", &rows, &B, &n, &k, &indices, &values, &threads, &isa))
    return nullptr;
  const Functions* f = functions_named(isa);
  if (!f) return nullptr;
  bool whole = false;
  if (!unlocked([&] {
        whole = largest(at<const float>(rows), B, n, k, at<int64_t>(indices), at<float>(values),
                        threads, *f);
      }))
    return nullptr;
  return PyBool_FromLong(whole);
}

PyObject* pursue_orthogonal(PyObject*, PyObject* args) {
  Address x, dictionary, gram, correlation, k_rows, indices, values, steps;
  long long B, d, n, k, threads;
  int select, nonnegative, gradient;
  double residual_threshold, correlation_threshold;
  const char* isa;
  if (!PyArg_ParseTuple(args, "KKKKKLLLLippddKKKLs", &x, &dictionary, &gram, &correlation, &k_rows,
                        &B, &d, &n, &k, &select, &nonnegative, &gradient, &residual_threshold,
                        &correlation_threshold, &indices, &values, &steps, &threads, &isa))
    return nullptr;
  const Functions* f = functions_named(isa);
  if (!f) return nullptr;
  const Orthogonal q = {at<const float>(x),
                        at<const float>(dictionary),
                        at<const float>(gram),
                        at<float>(correlation),
                        at<const int64_t>(k_rows),
                        B,
                        d,
                        n,
                        k,
                        select,
                        nonnegative != 0,
                        gradient != 0,
                        residual_threshold,
                        correlation_threshold,
                        at<int64_t>(indices),
                        at<float>(values),
                        at<int64_t>(steps)};
  return none_if(unlocked([&] { orthogonal(q, threads, *f); }));
}

PyObject* advise(PyObject*, PyObject* args) {
  Address address;
  long long bytes;
  if (!PyArg_ParseTuple(args, "KL", &address, &bytes)) return nullptr;
  large_pages(at<void>(address), size_t(bytes));
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"describe", describe, METH_VARARGS, "instruction set in use, and whether it has bf16 products"},
    {"pack", pack, METH_VARARGS, "bf16 panels of an encoder; largest error of a row"},
    {"norm", norm, METH_VARARGS, "largest norm of the rows of a matrix"},
    {"quantise", quantise, METH_VARARGS, "fp32 Gram rows to 16 bits"},
    {"pursue", pursue, METH_VARARGS, "pursuit with the whole Gram"},
    {"stream", stream, METH_VARARGS, "pursuit with correlations computed anew in each step"},
    {"session", session, METH_VARARGS, "pursuit whose Gram rows come step by step"},
    {"choose", choose, METH_VARARGS, "a step of a session; rows still going"},
    {"subtract", subtract, METH_VARARGS, "Gram rows for the step just taken"},
    {"renew", renew, METH_VARARGS, "correlations of a session computed anew"},
    {"backward", backward, METH_VARARGS, "reverse pass"},
    {"decode", sparse<decode>, METH_VARARGS, "chosen atoms added up"},
    {"decode_dots", sparse<decode_dots>, METH_VARARGS, "products with the chosen atoms"},
    {"decode_scatter", sparse<decode_scatter>, METH_VARARGS, "rows added up by chosen atom"},
    {"coselection", penalise, METH_VARARGS, "positive products of atoms chosen together"},
    {"largest", find_largest, METH_VARARGS, "k largest of each row; false where NaN is in the way"},
    {"orthogonal", pursue_orthogonal, METH_VARARGS, "orthogonal pursuit with the whole Gram"},
    {"large_pages", advise, METH_VARARGS, "advise large pages"},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_cpu", "CPU kernel of mpsae.", -1, methods,
                          nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__cpu() { return PyModule_Create(&definition); }

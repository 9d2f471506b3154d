// The module _C: each op of the library as a Python function that forwards to its torch.ops object.
//
// The static initialisers of schema.cpp and the back ends have registered the ops when this file's init runs. Each
// function holds one reference to its op for the life of the process (never released: no destructor may run after
// the interpreter). The op releases the GIL itself. This file includes no kernel.
#include <pybind11/pybind11.h>
#include <pybind11/typing.h>

namespace py = pybind11;

namespace tsam {
namespace cpu {
const char* isa_name();
}
namespace ops {
std::vector<std::pair<const char*, bool>> noises();
}
}  // namespace tsam

namespace {

// What the signatures in the docstrings say; torch.ops checks the values.
struct Tensor : py::object {
  using py::object::object;
  explicit Tensor(const py::object& value) : py::object(value) {}
  static bool check_(py::handle) { return true; }
};
template <typename T>
struct List : py::object {
  using py::object::object;
  explicit List(const py::object& value) : py::object(value) {}
  static bool check_(py::handle value) { return PyList_Check(value.ptr()) || PyTuple_Check(value.ptr()); }
};

}  // namespace

namespace pybind11 {
namespace detail {
template <>
struct handle_type_name<Tensor> {
  static constexpr auto name = const_name("torch.Tensor");
};
template <typename T>
struct handle_type_name<List<T>> {
  static constexpr auto name = const_name("list[") + make_caster<T>::name + const_name("]");
};
}  // namespace detail
}  // namespace pybind11

namespace {

py::arg named(const char* name) { return py::arg(name); }
py::arg_v named(const py::arg_v& name) { return name; }

// Names are strings, or py::arg("name") = default.
template <typename Result, typename... Args, typename... Names>
void expose(py::module_& m, const py::object& ops, const char* name, const Names&... names) {
  static_assert(sizeof...(Args) == sizeof...(Names));
  const py::handle op = py::object(ops.attr(name).attr("default")).release();
  m.def(name, [op](const Args&... args) -> Result { return op(args...).template cast<Result>(); }, named(names)...);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled ops of tsam_ext; import tsam_ext, not this module.";
  const py::object ops = py::module_::import("torch").attr("ops").attr("tsam");
  using Tensors = List<Tensor>;
  using TensorPair = py::typing::Tuple<Tensor, Tensor>;
  const py::arg_v stage = py::arg("stage") = -1, rounding = py::arg("rounding") = -1;
  m.attr("__isa__") = tsam::cpu::isa_name();
  py::list noises;
  for (const auto& [name, needs_norm] : tsam::ops::noises()) noises.append(py::make_tuple(name, needs_norm));
  m.attr("__noises__") = py::tuple(noises);

  expose<Tensor, Tensor, double>(m, ops, "tilted_loss", "losses", "tilt");
  expose<Tensor, Tensor, double>(m, ops, "tilted_weights", "losses", "tilt");
  expose<Tensor, Tensor, Tensor, double>(m, ops, "tilted_reduce", "losses", "values", "tilt");
  expose<TensorPair, Tensor, Tensor, Tensor, Tensor, Tensor>(m, ops, "leapfrog", "position", "momentum",
                                                             "grad_log_density", "step_size", "inverse_mass");
  expose<Tensor, Tensor, Tensor, Tensor>(m, ops, "kick", "momentum", "grad_log_density", "a");
  expose<void, Tensor, Tensor, Tensor, Tensor, Tensor>(m, ops, "leapfrog_", "position", "momentum", "grad_log_density",
                                                       "step_size", "inverse_mass");
  expose<void, Tensor, Tensor, Tensor>(m, ops, "kick_", "momentum", "grad_log_density", "a");
  expose<Tensor, Tensor, Tensor, int64_t, int64_t, int64_t, int64_t>(m, ops, "perturb", "x", "radius", "seed", "draw",
                                                                     "base", "kind");
  expose<Tensor, Tensor, int64_t>(m, ops, "tilt_summary", "state", "num_samples");

  expose<void, Tensors, Tensors, Tensor, List<double>, List<bool>, List<int64_t>, int64_t, int64_t, int64_t, int64_t,
         int64_t, bool, bool, int64_t, int64_t>(m, ops, "perturb_", "position", "saved", "state", "radius", "adaptive",
                                                "base", "seed", "step", "sample", "noise", "dimension", "negate",
                                                "save", rounding, stage);
  expose<void, Tensors, Tensors, Tensor, List<bool>, int64_t, int64_t>(m, ops, "grad_norm_", "grads", "origin", "state",
                                                                       "adaptive", "row", stage);
  expose<void, Tensors, Tensors, Tensors, Tensor, List<double>, List<bool>, bool, List<int64_t>, int64_t, int64_t,
         int64_t>(m, ops, "ascend_", "position", "saved", "grads", "state", "rho", "adaptive", "save",
                  py::arg("base") = py::list(), py::arg("seed") = 0, py::arg("step") = 0, rounding);
  expose<void, Tensors, Tensors, Tensors, Tensor, List<double>, List<bool>, bool, int64_t, List<int64_t>, int64_t,
         int64_t, int64_t, int64_t>(m, ops, "norm_ascend_", "position", "saved", "grads", "state", "rho", "adaptive",
                                    "save", "row", py::arg("base") = py::list(), py::arg("seed") = 0,
                                    py::arg("step") = 0, rounding, stage);
  expose<void, Tensors, Tensors, Tensors, Tensor, List<double>, List<bool>>(
      m, ops, "displacement_", "position", "saved", "grads", "sums", "rho", "adaptive");
  expose<void, Tensor, Tensor>(m, ops, "tilt_begin_", "state", "tilt");
  expose<void, Tensor, Tensor, double, int64_t, bool, bool>(m, ops, "tilt_update_", "state", "loss", "log_size", "row",
                                                            "skip_nonfinite", "last");
  expose<void, Tensors, Tensors, Tensor>(m, ops, "accumulate_", "accumulator", "grads", "state");
  expose<void, Tensors, Tensors, Tensors, Tensors, Tensor, List<double>, List<bool>, List<int64_t>, int64_t, int64_t,
         int64_t, int64_t, int64_t, bool, int64_t, int64_t>(
      m, ops, "accumulate_perturb_", "accumulator", "grads", "position", "saved", "state", "radius", "adaptive", "base",
      "seed", "step", "sample", "noise", "dimension", "negate", rounding, stage);
  expose<void, Tensors, Tensors, Tensor, int64_t>(m, ops, "take_direction_", "plain", "tilted", "direction", stage);
  expose<void, Tensors, Tensors, Tensor, int64_t>(m, ops, "add_direction_", "grads", "carried", "direction", stage);
  expose<void, Tensors, Tensors>(m, ops, "restore_", "position", "saved");

  using Numbers = List<double>;
  using Flags = List<bool>;
  using Integers = List<int64_t>;
  expose<void, Tensors, Tensors, Tensors, Tensors, Tensors, Tensor, Tensor, Numbers, Flags, Integers, int64_t, int64_t,
         int64_t, int64_t, bool, int64_t, int64_t>(m, ops, "hmc_place_", "position", "saved", "x0", "x1", "x2", "chain",
                                                   "state", "rho", "adaptive", "base", "seed", "step", "dimension",
                                                   "prior", "draw", rounding, stage);
  expose<void, Tensors, Tensors, Tensor, Tensor, Tensor, Tensor, Tensor, bool, Numbers, Flags, int64_t, int64_t,
         int64_t>(m, ops, "hmc_begin_", "saved", "grads", "chain", "state", "loss", "tilt", "delta", "automatic", "rho",
                  "adaptive", "dimension", "prior", stage);
  expose<void, Tensors, Tensors, Tensors, Tensors, Tensors, Tensors, Tensors, Tensor, Numbers, Flags, Integers, int64_t,
         int64_t, int64_t, int64_t, int64_t, double, double, bool, bool, int64_t, int64_t>(
      m, ops, "hmc_leapfrog_", "position", "saved", "momentum", "x0", "x1", "x2", "grads", "chain", "rho", "adaptive",
      "base", "seed", "step", "trajectory", "dimension", "prior", "kick", "drift", "first", "measure", rounding, stage);
  expose<void, Tensors, Tensors, Tensors, Tensor, Tensor, Tensor, Numbers, Flags, int64_t, int64_t, int64_t, int64_t,
         int64_t, double, int64_t, bool, bool, bool, int64_t>(
      m, ops, "hmc_end_", "saved", "momentum", "grads", "chain", "state", "loss", "rho", "adaptive", "seed", "step",
      "trajectory", "dimension", "prior", "kick", "row", "metropolis", "skip_nonfinite", "last", stage);
  expose<void, Tensor, Tensor, Tensor, double, int64_t, int64_t, bool, bool, bool>(
      m, ops, "hmc_recycle_", "chain", "state", "loss", "share", "row", "part", "metropolis", "skip_nonfinite", "last");
  expose<void, Tensors, Tensors, Tensors, Tensor, Tensor, bool>(m, ops, "hmc_carry_", "accumulator", "carried", "grads",
                                                                "chain", "state", "count");
  expose<void, Tensor, double>(m, ops, "hmc_adapt_", "chain", "highest");
}

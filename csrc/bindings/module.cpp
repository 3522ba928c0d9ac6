// The classes of firstlm for Python, `firstlm._native`. Ops are in _ops.so, which is loaded first.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>

#include "../bandwidth.h"
#include "checks.h"
#include "engine_module.h"
#include "skip_cache.h"

namespace firstlm {
namespace {

namespace py = pybind11;
using at::Tensor;

// bool [B, L] or [B] on the CPU -> its elements.
std::vector<uint8_t> flags_of(const Tensor& mask) {
  TORCH_CHECK_TYPE(mask.scalar_type() == at::kBool, "mask is ", mask.scalar_type(),
                   "; expected bool");
  TORCH_CHECK_VALUE(mask.device().is_cpu(), "mask is on ", mask.device(), "; expected the CPU");
  const Tensor dense = mask.contiguous();
  const bool* flags = dense.const_data_ptr<bool>();
  return {flags, flags + dense.numel()};
}

KeepMask keep_mask_of(const Tensor& mask) {
  TORCH_CHECK_VALUE(mask.dim() == 2, "keep mask has shape ", mask.sizes(), "; expected [B, L]");
  return {mask.size(0), mask.size(1), flags_of(mask)};
}

std::optional<Tensor> tensor_of(const std::optional<KeepMask>& mask) {
  if (!mask) return std::nullopt;
  Tensor tensor = at::empty({mask->B(), mask->L()}, at::kBool);
  std::copy(mask->values().begin(), mask->values().end(), tensor.mutable_data_ptr<bool>());
  return tensor;
}

py::dict memory(const SkipCacheStorage& cache) { return memory_dict(cache.memory()); }

uint64_t read_tensor(const Tensor& tensor) {
  TORCH_CHECK_VALUE(tensor.device().is_cpu() && tensor.is_contiguous(), "tensor is on ",
                    tensor.device(), " with strides ", tensor.strides(),
                    "; expected a contiguous one on the CPU");
  return read_all(tensor.const_data_ptr(), static_cast<int64_t>(tensor.nbytes()), num_threads());
}

// --- Router scoring: torch.ops' reading of Python arguments takes long beside a short prompt ---

using OptionalTensor = std::optional<Tensor>;

struct Head {
  const Tensor &weight, &bias;
  const OptionalTensor &out_weight, &out_bias;
  double norm_eps;
};

Tensor score(const Tensor& pooled, const Head& head) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("firstlm::router_head", "")
                             .typed<Tensor(const Tensor&, const Tensor&, const Tensor&,
                                           const OptionalTensor&, const OptionalTensor&, double)>();
  const auto as_pooled = [&](const Tensor& parameter) {
    return parameter.to(pooled.scalar_type());
  };
  const auto as_optional = [&](const OptionalTensor& parameter) {
    return parameter ? OptionalTensor(as_pooled(*parameter)) : std::nullopt;
  };
  return op.call(pooled, as_pooled(head.weight), as_pooled(head.bias), as_optional(head.out_weight),
                 as_optional(head.out_bias), head.norm_eps);
}

// `pool` is an op that pools: router_pool of [B, T, D] and a mask, or router_pool_packed of [N, D]
// and offsets.
template <const char* pool>
Tensor router_score(const Tensor& hidden, const Tensor& prompts, const Tensor& weight,
                    const Tensor& bias, const OptionalTensor& out_weight,
                    const OptionalTensor& out_bias, double norm_eps, std::string_view kind,
                    int64_t windows) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow(pool, "")
          .typed<Tensor(const Tensor&, const Tensor&, std::string_view, int64_t)>();
  return score(op.call(hidden, prompts, kind, windows),
               {weight, bias, out_weight, out_bias, norm_eps});
}

constexpr char kPool[] = "firstlm::router_pool";
constexpr char kPoolPacked[] = "firstlm::router_pool_packed";

// --- Pickle and copy.deepcopy -----------------------------------------------------------------

using LayerState = std::tuple<int64_t, int64_t, std::optional<Tensor>, std::optional<Tensor>>;
using State = std::tuple<SkipCacheStorage::Windows, std::optional<Tensor>, std::vector<LayerState>>;

State state_of(const SkipCacheStorage& cache) {
  SkipCacheStorage::Windows windows;
  for (int64_t l = 0; l < cache.L(); ++l) windows.push_back(cache.layer(l).books.window());
  std::vector<LayerState> layers;
  for (const auto& layer : cache.saved()) {
    layers.emplace_back(layer.length, layer.bytes_per_token, layer.keys, layer.values);
  }
  return {std::move(windows), tensor_of(cache.mask()), std::move(layers)};
}

SkipCacheStorage cache_of(const State& state) {
  const auto& [windows, mask, saved] = state;
  std::vector<SkipCacheStorage::SavedLayer> layers;
  for (const auto& [length, bytes_per_token, keys, values] : saved) {
    layers.push_back({length, bytes_per_token, keys, values});
  }
  return SkipCacheStorage::restored(
      windows, mask ? std::optional(keep_mask_of(*mask)) : std::nullopt, layers);
}

// --- Errors -----------------------------------------------------------------------------------

// torch's errors as its own functions raise them; pybind11 knows those of the standard library.
void translate_torch_errors(std::exception_ptr error) {
  try {
    std::rethrow_exception(error);
  } catch (const c10::Error&) {
    torch::translate_exception_to_python(error);
  } catch (const python_error&) {  // of a kernel written in Python
    torch::translate_exception_to_python(error);
  }
}

}  // namespace
}  // namespace firstlm

PYBIND11_MODULE(_native, m) {
  using firstlm::SkipCacheStorage;
  namespace py = pybind11;
  py::register_local_exception_translator(firstlm::translate_torch_errors);

  m.def("read_all", firstlm::read_tensor, py::call_guard<py::gil_scoped_release>(),
        py::arg("tensor"));
  // As torch.ops.firstlm has them, through torch's dispatcher.
  m.def("router_score", firstlm::router_score<firstlm::kPool>,
        py::call_guard<py::gil_scoped_release>());
  m.def("router_score_packed", firstlm::router_score<firstlm::kPoolPacked>,
        py::call_guard<py::gil_scoped_release>());

  py::class_<SkipCacheStorage>(m, "SkipCacheStorage")
      .def(py::init<const SkipCacheStorage::Windows&>(), py::arg("windows"))
      .def_property_readonly("batch_size", &SkipCacheStorage::B)
      .def_property_readonly("num_layers", &SkipCacheStorage::L)
      .def_property_readonly("length", &SkipCacheStorage::length)
      .def_property_readonly("keep_mask",
                             [](const SkipCacheStorage& c) { return firstlm::tensor_of(c.mask()); })
      // Of one layer.
      .def("window", [](const SkipCacheStorage& c, int64_t l) { return c.layer(l).books.window(); })
      .def("num_rows", [](const SkipCacheStorage& c, int64_t l) { return c.layer(l).R(); })
      .def("layer_length",
           [](const SkipCacheStorage& c, int64_t l) { return c.layer(l).books.length(); })
      .def("visible_start", [](const SkipCacheStorage& c, int64_t l,
                               int64_t length) { return c.layer(l).books.visible_start(length); })
      .def("is_initialized",
           [](const SkipCacheStorage& c, int64_t l) { return c.layer(l).keys.defined(); })
      .def("visible", &SkipCacheStorage::visible)
      .def("initialize", &SkipCacheStorage::initialize)
      .def("append", &SkipCacheStorage::append, py::call_guard<py::gil_scoped_release>())
      // Of the cache.
      .def("restrict_to",
           [](SkipCacheStorage& c, const at::Tensor& keep) {
             c.restrict_to(firstlm::keep_mask_of(keep));
           })
      .def("restrict_layer",
           [](SkipCacheStorage& c, int64_t l, const at::Tensor& keep) {
             TORCH_CHECK_VALUE(keep.dim() == 1, "keep has shape ", keep.sizes(), "; expected [B]");
             c.restrict_layer(l, firstlm::flags_of(keep));
           })
      .def("select", &SkipCacheStorage::select)
      .def("repeat", &SkipCacheStorage::repeat)
      .def("crop", &SkipCacheStorage::crop)
      .def("reset", &SkipCacheStorage::reset)
      .def("memory", firstlm::memory)
      .def(py::pickle(&firstlm::state_of, &firstlm::cache_of));

  firstlm::add_engine(m);
}

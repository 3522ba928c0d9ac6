// The native engine for Python: what module.cpp adds to `firstlm._native`.
#include "engine_module.h"

#include <ATen/ops/empty.h>
#include <torch/csrc/utils/pybind.h>

#include <chrono>

#include "../team.h"
#include "checks.h"
#include "engine.h"
#include "packing.h"
#include "router_arguments.h"

namespace firstlm {
namespace {

namespace py = pybind11;
using at::Tensor;
using ReleaseGil = py::call_guard<py::gil_scoped_release>;

template <class T>
T entry(const py::dict& values, const char* name) {
  TORCH_CHECK_VALUE(values.contains(name), "the config has no entry ", name);
  return values[name].cast<T>();
}

DecoderConfig decoder_config(const py::dict& values) {
  const auto precision = parse_precision(entry<std::string>(values, "precision"));
  std::vector<uint8_t> rotates;
  for (const bool layer : entry<std::vector<bool>>(values, "rotates")) rotates.push_back(layer);
  return {
      .L = entry<int64_t>(values, "num_layers"),
      .D = entry<int64_t>(values, "hidden_size"),
      .I = entry<int64_t>(values, "intermediate_size"),
      .Hq = entry<int64_t>(values, "num_attention_heads"),
      .H = entry<int64_t>(values, "num_key_value_heads"),
      .head_dim = entry<int64_t>(values, "head_dim"),
      .V = entry<int64_t>(values, "vocab_size"),
      .norm_eps = entry<double>(values, "rms_norm_eps"),
      .attention_scale = entry<double>(values, "attention_scale"),
      .inverse_frequencies = entry<std::vector<float>>(values, "inv_freq"),
      .rope_scaling = entry<double>(values, "rope_scaling"),
      .rotates = std::move(rotates),
      .windows = entry<std::vector<std::optional<int64_t>>>(values, "windows"),
      .cache_dtype = precision == Precision::kFloat32 ? DType::kFloat32 : DType::kBFloat16,
  };
}

SamplingSettings sampling_settings(const py::dict& values) {
  SamplingSettings settings;
  for (const auto& [key, value] : values) {
    const auto name = key.cast<std::string>();
    if (name == "temperature") {
      settings.temperature = value.cast<double>();
    } else if (name == "top_k") {
      settings.top_k = value.cast<int64_t>();
    } else if (name == "top_p") {
      settings.top_p = value.cast<double>();
    } else if (name == "min_p") {
      settings.min_p = value.cast<double>();
    } else if (name == "repetition_penalty") {
      settings.repetition_penalty = value.cast<double>();
    } else if (name == "seed") {
      settings.seed = value.cast<uint64_t>();
    } else {
      TORCH_CHECK_VALUE(false, "'", name, "' is no sampling setting; expected temperature, top_k, ",
                        "top_p, min_p, repetition_penalty or seed");
    }
  }
  settings.check();
  return settings;
}

py::dict counters(NativeDecoder& decoder) {
  const DecoderCounters values = [&] {
    const py::gil_scoped_release without;  // a pass may wait for it
    return decoder.counters();
  }();
  py::dict counters;
  counters["forwards"] = values.forwards;
  counters["weight_bytes"] = values.weight_bytes;
  counters["cache_bytes"] = values.cache_bytes;
  counters["layer_runs"] = py::cast(values.layer_runs);
  counters["sequence_layer_runs"] = values.segment_runs;
  counters["router_seconds"] = 1e-9 * static_cast<double>(values.router_nanoseconds);
  return counters;
}

py::dict memory(const Sequence& sequence) { return memory_dict(sequence.memory()); }

std::optional<Tensor> keep_mask(const Sequence& sequence) {
  if (!sequence.has_plan()) return std::nullopt;
  const std::vector<uint8_t>& keep = sequence.keep();
  Tensor mask = at::empty({static_cast<int64_t>(keep.size())}, at::kBool);
  std::copy(keep.begin(), keep.end(), mask.mutable_data_ptr<bool>());
  return mask;
}

// Lets Python's signal handlers run now and then in a long call that has released the GIL. What
// they raise, KeyboardInterrupt as a rule, is thrown. Python runs them in its main thread only:
// elsewhere the GIL is not asked for, which others may hold, and which ends a thread that asks for
// it while the interpreter shuts down. Made with the GIL held.
class SignalCheck {
 public:
  SignalCheck() {
    const py::object main = py::module_::import("threading").attr("main_thread")();
    in_main_thread_ = main.attr("ident").cast<unsigned long>() == PyThread_get_thread_ident();
  }

  void operator()() {
    if (!in_main_thread_) return;
    const auto now = std::chrono::steady_clock::now();
    if (now - last_ < kInterval) return;
    last_ = now;
    const py::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
  }

 private:
  static constexpr std::chrono::milliseconds kInterval{50};
  bool in_main_thread_;
  std::chrono::steady_clock::time_point last_ = std::chrono::steady_clock::now();
};

std::pair<Tensor, std::optional<Tensor>> extend(NativeDecoder& decoder,
                                                std::vector<SequencePtr> sequences,
                                                std::vector<std::vector<int64_t>> tokens,
                                                std::optional<Tensor> keep,
                                                std::optional<std::vector<float>> thresholds,
                                                std::vector<int64_t> num_logits) {
  const SignalCheck interrupt;
  const py::gil_scoped_release release;
  ExtendResult result = decoder.extend({std::move(sequences), std::move(tokens), std::move(keep),
                                        std::move(thresholds), std::move(num_logits)},
                                       interrupt);
  return {std::move(result.logits), std::move(result.keep_prob)};
}

std::shared_ptr<Decoding> decoding(std::shared_ptr<NativeDecoder> decoder,
                                   std::vector<SequencePtr> sequences, Tensor logits,
                                   const std::vector<py::dict>& settings,
                                   const std::vector<std::vector<int64_t>>& seen,
                                   std::vector<int64_t> eos, std::vector<int64_t> max_new_tokens) {
  std::vector<SamplingSettings> parsed;
  for (const py::dict& values : settings) parsed.push_back(sampling_settings(values));
  return std::make_shared<Decoding>(std::move(decoder), std::move(sequences), std::move(logits),
                                    parsed, seen, std::move(eos), std::move(max_new_tokens));
}

Tensor probabilities(const Tensor& logits, const py::dict& settings,
                     const std::vector<int64_t>& seen) {
  TORCH_CHECK_VALUE(
      logits.dim() == 1 && logits.scalar_type() == at::kFloat && logits.device().is_cpu(),
      "logits are ", logits.scalar_type(), " ", logits.sizes(), " on ", logits.device(),
      "; expected float32 [V] on the CPU");
  Sampler sampler(sampling_settings(settings), logits.size(0));
  for (const int64_t token : seen) {
    TORCH_CHECK_VALUE(token >= 0 && token < logits.size(0), "token ", token,
                      " is outside of the vocabulary, [0, ", logits.size(0), ")");
    sampler.note(token);
  }
  Tensor scratch = logits.clone(at::MemoryFormat::Contiguous);
  Tensor to = at::empty({logits.size(0)}, at::kFloat);
  sampler.probabilities(scratch.mutable_data_ptr<float>(), to.mutable_data_ptr<float>());
  return to;
}

}  // namespace

py::dict memory_dict(const MemoryUse& use) {
  py::dict bytes;
  bytes["bytes"] = use.visible;
  bytes["allocated"] = use.allocated;
  bytes["full"] = use.full;
  return bytes;
}

void add_engine(py::module_& m) {
  m.attr("MAX_THREADS") = Team::kMaxSize;
  m.def(
      "check_sampling", [](const py::dict& settings) { sampling_settings(settings); },
      py::arg("settings"));
  m.def("packed_bytes", packed_bytes, py::arg("precision"), py::arg("N"), py::arg("K"));
  m.def("pack", pack, ReleaseGil(), py::arg("weights"), py::arg("precision"),
        py::arg("num_threads"), py::arg("out") = py::none());
  m.def("pack_columns", static_cast<Tensor (*)(const Tensor&)>(pack_columns), ReleaseGil(),
        py::arg("B"));
  m.def("unpack", unpack, ReleaseGil(), py::arg("packed"), py::arg("precision"), py::arg("N"),
        py::arg("K"));
  m.def("probabilities", probabilities, py::arg("logits"), py::arg("settings"), py::arg("seen"));

  py::class_<Sequence, SequencePtr>(m, "Sequence")
      .def_property_readonly("length", &Sequence::length)
      .def_property_readonly("keep_mask", keep_mask)
      .def("memory", memory)
      .def("crop", &Sequence::crop, py::arg("length"))
      .def(
          "restrict",
          [](Sequence& sequence, const Tensor& keep) {
            TORCH_CHECK_TYPE(keep.scalar_type() == at::kBool && keep.device().is_cpu(), "keep is ",
                             keep.scalar_type(), " on ", keep.device(),
                             "; expected bool on the CPU");
            const Tensor dense = keep.contiguous();
            const bool* flags = dense.const_data_ptr<bool>();
            sequence.restrict_to({flags, flags + dense.numel()});
          },
          py::arg("keep"))
      .def("copy", [](const Sequence& sequence) { return std::make_shared<Sequence>(sequence); });

  py::class_<Decoding, std::shared_ptr<Decoding>>(m, "Decoding")
      .def("advance", &Decoding::advance, ReleaseGil(), py::arg("steps"))
      .def_property_readonly("finished", &Decoding::finished)
      .def("finish", &Decoding::finish, py::arg("row"));

  py::class_<NativeDecoder, std::shared_ptr<NativeDecoder>>(m, "Decoder")
      .def(py::init([](const py::dict& config, NativeDecoder::Tensors tensors, int num_threads) {
             return std::make_shared<NativeDecoder>(
                 decoder_config(config), entry<std::string>(config, "precision"),
                 entry<std::string>(config, "head_precision"), std::move(tensors), num_threads);
           }),
           py::arg("config"), py::arg("tensors"), py::arg("num_threads"))
      .def(
          "set_routers",
          [](NativeDecoder& decoder, const std::string& pooling, int64_t windows, double norm_eps,
             bool skips, std::vector<NativeDecoder::Tensors> layers) {
            const py::gil_scoped_release without;  // a pass may wait for it
            decoder.set_routers(parse_pooling(pooling, windows), norm_eps, skips,
                                std::move(layers));
          },
          py::arg("pooling"), py::arg("windows"), py::arg("norm_eps"), py::arg("skips"),
          py::arg("tensors"))
      .def_property_readonly("num_threads", &NativeDecoder::num_threads)
      .def("sequence", &NativeDecoder::sequence)
      .def("extend", extend, py::arg("sequences"), py::arg("tokens"), py::arg("keep") = py::none(),
           py::arg("thresholds") = py::none(), py::arg("num_logits"))
      .def("decoding", decoding, py::arg("sequences"), py::arg("logits"), py::arg("settings"),
           py::arg("seen"), py::arg("eos"), py::arg("max_new_tokens"))
      .def("counters", counters);
}

}  // namespace firstlm

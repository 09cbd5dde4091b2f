// A simulated accelerator: torch's spare backend PrivateUse1 as a second device beside the CPU.
//
// Its tensors carry a dispatch key of their own, so that no CPU operation accepts them. Every operation of the device is
// carried out by the CPU's kernel over the device's memory, which only this file can see. What a GPU would pay for is
// counted: operations launched, copies from the host, and reads by which the host waits for the device. An operation
// over tensors of two devices is an error, as it is on a GPU.
//
// What it cannot show: speed, streams (every operation has ended when it returns), and the rounding of a GPU's kernels.

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/library.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

namespace py = pybind11;
using at::IntArrayRef;
using at::Scalar;
using at::ScalarType;
using at::Tensor;
using c10::Device;
using c10::DeviceType;
using c10::IValue;

namespace {

const Device THE_DEVICE(DeviceType::PrivateUse1, 0);
const c10::DispatchKeySet DEVICE_KEYS(c10::DispatchKey::PrivateUse1);
const c10::DispatchKeySet CPU_KEYS(c10::DispatchKey::CPU);

// --- counters -------------------------------------------------------------------------------------------------------

// Backward passes run in a thread of their own, hence the lock.
std::mutex counting;
std::map<std::string, int64_t> launched;  // operations that start a kernel on a GPU, by name
std::map<std::string, int64_t> reads;     // the host waits for a number or a tensor of the device
std::map<std::string, int64_t> copies;    // tensors that come from the host
py::function listener;                    // told of every read and copy, so that Python can say where it came from

void count(std::map<std::string, int64_t>& counter, const std::string& name) {
  std::lock_guard<std::mutex> lock(counting);
  counter[name]++;
}

void tell(const char* kind, const std::string& name) {
  py::gil_scoped_acquire gil;
  if (listener) listener(kind, name);
}

void count_read(const std::string& name) {
  count(reads, name);
  tell("read", name);
}

void count_copy(const std::string& name) {
  count(copies, name);
  tell("copy", name);
}

// --- memory ---------------------------------------------------------------------------------------------------------

struct Memory final : c10::Allocator {
  static void release(void* memory) { std::free(memory); }
  c10::DataPtr allocate(size_t bytes) override {
    void* memory = std::malloc(bytes ? bytes : 1);
    return {memory, memory, &release, THE_DEVICE};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};

Memory memory;
REGISTER_ALLOCATOR(DeviceType::PrivateUse1, &memory);

// Memory of the host that the system does not move.
struct PinnedMemory final : c10::Allocator {
  static std::set<const void*>& held() {
    static std::set<const void*> addresses;
    return addresses;
  }
  static void release(void* memory) {
    std::lock_guard<std::mutex> lock(counting);
    held().erase(memory);
    std::free(memory);
  }
  c10::DataPtr allocate(size_t bytes) override {
    void* memory = std::malloc(bytes ? bytes : 1);
    std::lock_guard<std::mutex> lock(counting);
    held().insert(memory);
    return {memory, memory, &release, Device(at::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
  bool holds(const void* data) const {
    std::lock_guard<std::mutex> lock(counting);
    return held().count(data) > 0;
  }
};

PinnedMemory pinned_memory;

bool on_device(const Tensor& tensor) {
  return tensor.defined() && tensor.device().type() == DeviceType::PrivateUse1;
}

// A tensor of the device as the CPU's kernels want it, over the same memory. Empty ones get memory of their own, since
// kernels resize them.
Tensor as_cpu(const Tensor& tensor) {
  if (!on_device(tensor)) return tensor;
  const auto options = at::TensorOptions().dtype(tensor.scalar_type()).device(at::kCPU);
  if (tensor.numel() == 0) return at::empty(tensor.sizes(), options);
  return at::from_blob(tensor.mutable_data_ptr(), tensor.sizes(), tensor.strides(), options);
}

// A copy of what a CPU kernel has returned, in the device's memory.
Tensor as_device(const Tensor& result) {
  Tensor tensor =
      at::detail::empty_strided_generic(result.sizes(), result.strides(), &memory, DEVICE_KEYS, result.scalar_type());
  as_cpu(tensor).copy_(result);
  return tensor;
}

// A view of a tensor's memory.
Tensor view_of(const Tensor& tensor, IntArrayRef sizes, IntArrayRef strides, int64_t offset) {
  auto view = at::detail::make_tensor<c10::TensorImpl>(
      c10::TensorImpl::VIEW, c10::Storage(tensor.storage()), tensor.key_set(), tensor.dtype());
  view.unsafeGetTensorImpl()->set_sizes_and_strides(sizes, strides, offset);
  return view;
}

// --- operations that need no kernel ---------------------------------------------------------------------------------

Tensor empty(
    c10::SymIntArrayRef sizes,
    std::optional<ScalarType> dtype,
    std::optional<at::Layout>,
    std::optional<Device>,
    std::optional<bool>,
    std::optional<at::MemoryFormat> format) {
  const auto type = dtype.value_or(at::get_default_dtype_as_scalartype());
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(sizes), &memory, DEVICE_KEYS, type, format);
}

Tensor empty_strided(
    IntArrayRef sizes,
    IntArrayRef strides,
    std::optional<ScalarType> dtype,
    std::optional<at::Layout>,
    std::optional<Device>,
    std::optional<bool>) {
  const auto type = dtype.value_or(at::get_default_dtype_as_scalartype());
  return at::detail::empty_strided_generic(sizes, strides, &memory, DEVICE_KEYS, type);
}

Tensor as_strided(
    const Tensor& self, IntArrayRef sizes, IntArrayRef strides, std::optional<int64_t> offset) {
  return view_of(self, sizes, strides, offset.value_or(self.storage_offset()));
}

Tensor view(const Tensor& self, IntArrayRef sizes) {
  const Tensor found = as_cpu(self).view(sizes);  // torch's own code decides whether such a view exists
  return view_of(self, found.sizes(), found.strides(), self.storage_offset());
}

Tensor reshape_alias(const Tensor& self, IntArrayRef sizes, IntArrayRef strides) {
  return view_of(self, sizes, strides, self.storage_offset());
}

const Tensor& resize_in_place(const Tensor& self, IntArrayRef sizes, std::optional<at::MemoryFormat>) {
  size_t bytes = self.itemsize() * (self.storage_offset() + c10::multiply_integers(sizes));
  auto storage = self.storage();
  if (storage.nbytes() < bytes) {
    auto grown = memory.allocate(bytes);
    std::memcpy(grown.get(), storage.data(), storage.nbytes());
    storage.set_data_ptr_noswap(std::move(grown));
    storage.set_nbytes(bytes);
  }
  self.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  return self;
}

Tensor& set_storage(
    Tensor& self, at::Storage source, int64_t offset, IntArrayRef sizes, IntArrayRef strides) {
  auto* tensor = self.unsafeGetTensorImpl();
  tensor->set_storage_keep_dtype(std::move(source));
  if (sizes.size() == strides.size()) {
    tensor->set_sizes_and_strides(sizes, strides, offset);
  } else {
    tensor->set_storage_offset(offset);
    tensor->set_sizes_contiguous(sizes);
  }
  return self;
}

Tensor& set_whole_storage(Tensor& self, at::Storage source) {
  const int64_t count = source.nbytes() / self.itemsize();
  return set_storage(self, std::move(source), 0, {count}, {});
}

// --- copies between host and device ---------------------------------------------------------------------------------

// Into memory that the system does not move a GPU copies on its own, while the host goes on.
Tensor copy_from(const Tensor& self, const Tensor& destination, bool non_blocking) {
  if (!on_device(destination)) {
    if (non_blocking && destination.is_pinned()) {
      count(launched, "aten::copy_");
    } else {
      count_read("copy to the host");
    }
  } else if (!on_device(self)) {
    count_copy("copy to the device");
  } else {
    count(launched, "aten::copy_");
  }
  as_cpu(destination).copy_(as_cpu(self));
  return destination;
}

Scalar read_number(const Tensor& self) {
  count_read("item");
  return as_cpu(self).item();
}

// --- every other operation ------------------------------------------------------------------------------------------

// On a GPU the host waits for these: the shape of a result, or whether a decomposition has converged, is known to the
// device alone.
const std::set<std::string> WAITED_FOR = {
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::unique_consecutive",
    "aten::repeat_interleave",
    "aten::equal",
    "aten::bincount",
    "aten::_linalg_svd",
};

// x[mask] = values waits for the number of entries, unless there is one value for all of them.
bool writes_by_mask(const std::string& name, c10::ArrayRef<IValue> arguments) {
  if (name != "aten::_index_put_impl_" || arguments[2].toTensor().numel() == 1) return false;
  for (const std::optional<Tensor>& index : arguments[1].toOptionalTensorVector()) {
    if (index && index->defined() && (index->scalar_type() == at::kBool || index->scalar_type() == at::kByte)) {
      return true;
    }
  }
  return false;
}

bool is_a_view(const c10::FunctionSchema& schema) {
  for (const auto& result : schema.returns()) {
    if (result.alias_info() && !result.alias_info()->isWrite()) return true;
  }
  return false;
}

void count_call(const c10::FunctionSchema& schema, c10::ArrayRef<IValue> arguments) {
  const std::string& name = schema.name();
  if (name == "aten::_fused_sdp_choice" || is_a_view(schema)) return;  // the host's own work
  count(launched, name);
  if (WAITED_FOR.count(name) > 0 || writes_by_mask(name, arguments)) count_read(name);
}

// The arguments of one call on their way to the CPU's kernel, and its results on their way back.
class Call {
 public:
  IValue to_cpu(const IValue& argument) {
    if (argument.isTensor()) return one_to_cpu(argument.toTensor(), true);
    if (argument.isTensorList()) {
      std::vector<Tensor> found;
      for (const Tensor& tensor : argument.toTensorVector()) found.push_back(one_to_cpu(tensor, false));
      return found;
    }
    if (argument.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> found;
      for (const std::optional<Tensor>& tensor : argument.toOptionalTensorVector()) {
        found.push_back(tensor ? std::optional<Tensor>(one_to_cpu(*tensor, true)) : std::nullopt);
      }
      return found;
    }
    if (argument.isDevice()) return Device(at::kCPU);
    return argument;
  }

  bool mixes_devices() const { return sees_device_ && sees_cpu_; }

  // An output that the kernel has resized lies in other memory now.
  void take_back_resized() {
    for (auto& [tensor, cpu] : pairs_) {
      if (cpu.sizes() == tensor.sizes()) continue;
      resize_in_place(tensor, cpu.sizes(), std::nullopt);
      as_cpu(tensor).copy_(cpu);
    }
  }

  IValue to_device(const IValue& result) const {
    if (result.isTensor()) return one_to_device(result.toTensor());
    if (result.isTensorList()) {
      std::vector<Tensor> found;
      for (const Tensor& tensor : result.toTensorVector()) found.push_back(one_to_device(tensor));
      return found;
    }
    return result;
  }

 private:
  // A single number of the CPU may take part in an operation: a GPU's kernels get it as an argument.
  Tensor one_to_cpu(const Tensor& tensor, bool number_allowed) {
    if (!tensor.defined()) return tensor;
    if (!on_device(tensor)) {
      sees_cpu_ = sees_cpu_ || tensor.dim() > 0 || !number_allowed;
      return tensor;
    }
    sees_device_ = true;
    for (const auto& [seen, cpu] : pairs_) {
      if (seen.is_same(tensor)) return cpu;
    }
    pairs_.emplace_back(tensor, as_cpu(tensor));
    return pairs_.back().second;
  }

  // A result is an argument itself, a view of one, or new.
  Tensor one_to_device(const Tensor& result) const {
    if (!result.defined() || on_device(result)) return result;
    for (const auto& [tensor, cpu] : pairs_) {
      if (cpu.is_same(result)) return tensor;
    }
    const char* data = result.numel() ? static_cast<const char*>(result.const_data_ptr()) : nullptr;
    for (const auto& [tensor, cpu] : pairs_) {
      const char* begin = static_cast<const char*>(tensor.storage().data());
      if (data && data >= begin && data < begin + tensor.storage().nbytes()) {
        return view_of(tensor, result.sizes(), result.strides(), (data - begin) / result.itemsize());
      }
    }
    return as_device(result);
  }

  std::vector<std::pair<Tensor, Tensor>> pairs_;  // of the device, and the same memory for the CPU
  bool sees_device_ = false;
  bool sees_cpu_ = false;
};

// A list of tensors copied to another device: a GPU copies them one by one. Returns whether that was asked for.
bool copied_one_by_one(const c10::FunctionSchema& schema, torch::jit::Stack* stack) {
  if (schema.name() != "aten::_foreach_copy_") return false;
  const auto arguments = torch::jit::last(*stack, 3);
  const auto destinations = arguments[0].toTensorVector();
  const auto sources = arguments[1].toTensorVector();
  bool between_devices = false;
  for (size_t i = 0; i < sources.size(); i++) {
    between_devices = between_devices || sources[i].device() != destinations[i].device();
  }
  if (!between_devices) return false;
  for (size_t i = 0; i < sources.size(); i++) destinations[i].copy_(sources[i]);
  torch::jit::drop(*stack, 3);
  return true;
}

// Of single tensors that are changed in place torch counts the versions itself; of lists, a device's kernel has to.
void note_new_versions(const c10::FunctionSchema& schema, c10::ArrayRef<IValue> arguments) {
  for (size_t i = 0; i < arguments.size(); i++) {
    const auto* alias = schema.arguments()[i].alias_info();
    if (!arguments[i].isTensorList() || !alias || !alias->isWrite()) continue;
    for (const Tensor& tensor : arguments[i].toTensorVector()) tensor.unsafeGetTensorImpl()->bump_version();
  }
}

void run(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  if (copied_one_by_one(schema, stack)) return;
  const size_t first_argument = stack->size() - schema.arguments().size();
  count_call(schema, c10::ArrayRef<IValue>(*stack).slice(first_argument));
  note_new_versions(schema, c10::ArrayRef<IValue>(*stack).slice(first_argument));
  Call call;
  for (size_t i = first_argument; i < stack->size(); i++) (*stack)[i] = call.to_cpu((*stack)[i]);
  TORCH_CHECK(
      !call.mixes_devices(),
      "Expected all tensors to be on the same device, but ",
      schema.name(),
      " got some of the CPU and some of the device");
  op.redispatchBoxed(CPU_KEYS, stack);
  call.take_back_resized();
  for (size_t i = stack->size() - schema.returns().size(); i < stack->size(); i++) {
    (*stack)[i] = call.to_device((*stack)[i]);
  }
}

// --- convolutions, which torch hands over under other names ---------------------------------------------------------

Tensor convolution(
    const Tensor& input,
    const Tensor& weight,
    const std::optional<Tensor>& bias,
    c10::SymIntArrayRef stride,
    c10::SymIntArrayRef padding,
    c10::SymIntArrayRef dilation,
    bool transposed,
    c10::SymIntArrayRef output_padding,
    c10::SymInt groups) {
  count(launched, "aten::convolution");
  const auto own_bias = bias ? std::optional<Tensor>(as_cpu(*bias)) : std::nullopt;
  return as_device(at::convolution_symint(
      as_cpu(input), as_cpu(weight), own_bias, stride, padding, dilation, transposed, output_padding, groups));
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(
    const Tensor& gradient,
    const Tensor& input,
    const Tensor& weight,
    c10::SymIntArrayRef stride,
    c10::SymIntArrayRef padding,
    c10::SymIntArrayRef dilation,
    bool transposed,
    c10::SymIntArrayRef output_padding,
    c10::SymInt groups,
    std::array<bool, 3> wanted) {
  count(launched, "aten::convolution_backward");
  const std::vector<c10::SymInt> bias_sizes = {gradient.sym_size(1)};
  auto [of_input, of_weight, of_bias] = at::convolution_backward_symint(
      as_cpu(gradient),
      as_cpu(input),
      as_cpu(weight),
      c10::SymIntArrayRef(bias_sizes),
      stride,
      padding,
      dilation,
      transposed,
      output_padding,
      groups,
      wanted);
  auto back = [](const Tensor& found) { return found.defined() ? as_device(found) : found; };
  return {back(of_input), back(of_weight), back(of_bias)};
}

// --- what torch asks of a device ------------------------------------------------------------------------------------

struct Guard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::PrivateUse1; }
  Device exchangeDevice(Device) const override { return THE_DEVICE; }
  Device getDevice() const override { return THE_DEVICE; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  c10::Stream getStream(Device device) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream getNewStream(Device device, int) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  Device getDeviceFromPtr(void*) const override { return THE_DEVICE; }
  at::Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  bool isPinnedPtr(const void* data) const override { return pinned_memory.holds(data); }
};

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&run>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("as_strided", as_strided);
  m.impl("view", view);
  m.impl("_reshape_alias", reshape_alias);
  m.impl("resize_", resize_in_place);
  m.impl("set_.source_Storage", set_whole_storage);
  m.impl("set_.source_Storage_storage_offset", set_storage);
  m.impl("_copy_from", copy_from);
  m.impl("_local_scalar_dense", read_number);
  m.impl("convolution_overrideable", convolution);
  m.impl("convolution_backward_overrideable", convolution_backward);

  // A GPU has one kernel for it; without one of the device torch composes it from others.
  m.impl("native_layer_norm", torch::CppFunction::makeFromBoxedFunction<&run>());

  // So are operations over lists of tensors, which torch would run tensor by tensor.
  for (const auto& op : c10::Dispatcher::singleton().getAllOpNames()) {
    if (op.name.rfind("aten::_foreach_", 0) != 0) continue;
    const std::string name = op.overload_name.empty() ? op.name : op.name + "." + op.overload_name;
    m.impl(name.c_str(), torch::CppFunction::makeFromBoxedFunction<&run>());
  }
}

// Autocast takes a GPU's lists of operations.
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFallthrough());
}

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
#define LOWER(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
#define FLOAT32(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32)
#define FLOAT32_BY_DTYPE(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32_set_opt_dtype)
#define WIDEST(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, promote)
  AT_FORALL_LOWER_PRECISION_FP(LOWER)
  AT_FORALL_FP32(FLOAT32)
  AT_FORALL_FP32_SET_OPT_DTYPE(FLOAT32_BY_DTYPE)
  AT_FORALL_DIFFERENT_REDISPATCH_SIGNATURE(KERNEL_DIFFERENT_REDISPATCH_SIGNATURE_PRIVATEUSEONE)
  AT_FORALL_PROMOTE(WIDEST)
  KERNEL_PRIVATEUSEONE(stack, promote)
  KERNEL_PRIVATEUSEONE(cat, promote)
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  static Hooks hooks;
  at::RegisterPrivateUse1HooksInterface(&hooks);
  m.def("launched", [] { std::lock_guard<std::mutex> lock(counting); return launched; });
  m.def("reads", [] { std::lock_guard<std::mutex> lock(counting); return reads; });
  m.def("copies", [] { std::lock_guard<std::mutex> lock(counting); return copies; });
  m.def("listen", [](py::object told) { listener = told.is_none() ? py::function() : told.cast<py::function>(); });
  m.attr("_at_exit") = py::capsule([] { listener.release(); });
}

// A CUDA device made of host memory and CPU kernels, for a torch without CUDA (tests/emulated_cuda/__init__.py).
//
// A tensor on this device has the device type, dispatch key and device checks of CUDA, but lies in host memory. An
// operation without a kernel below runs on tensors of the CPU over the same memory; what it returns is moved back by
// name only. A tensor on the CPU beside one on the device is an error, as on CUDA.

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

using namespace at;

// ---------------------------------------------------------------- memory

static const Device DEVICE(DeviceType::CUDA, 0);
static constexpr size_t ALIGNMENT = 64;

static void* allocate_bytes(size_t size) {
  return std::aligned_alloc(ALIGNMENT, (std::max<size_t>(size, 1) + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
}

struct HostBackedAllocator final : Allocator {
  DataPtr allocate(size_t size) override {
    void* data = allocate_bytes(size);
    return {data, data, &std::free, DEVICE};
  }
  DeleterFnPtr raw_deleter() const override { return &std::free; }
  void copy_data(void* to, const void* from, size_t size) const override { std::memcpy(to, from, size); }
};
static HostBackedAllocator device_memory;
REGISTER_ALLOCATOR(DeviceType::CUDA, &device_memory)

static std::mutex pinned_lock;
static std::map<const char*, size_t> pinned_blocks;  // start -> bytes

struct PinnedAllocator final : Allocator {
  static void release(void* data) {
    std::lock_guard<std::mutex> guard(pinned_lock);
    pinned_blocks.erase(static_cast<const char*>(data));
    std::free(data);
  }
  DataPtr allocate(size_t size) override {
    void* data = allocate_bytes(size);
    std::lock_guard<std::mutex> guard(pinned_lock);
    pinned_blocks[static_cast<const char*>(data)] = std::max<size_t>(size, 1);
    return {data, data, &release, Device(DeviceType::CPU)};
  }
  DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t size) const override { std::memcpy(to, from, size); }
  static bool owns(const void* data) {
    std::lock_guard<std::mutex> guard(pinned_lock);
    auto place = static_cast<const char*>(data);
    auto next = pinned_blocks.upper_bound(place);
    return next != pinned_blocks.begin() && place < std::prev(next)->first + std::prev(next)->second;
  }
};
static PinnedAllocator pinned_memory;

// ---------------------------------------------------------------- device and streams

namespace {
struct EmulatedGuard final : c10::impl::DeviceGuardImplInterface {
  static constexpr DeviceType static_type = DeviceType::CUDA;
  EmulatedGuard() = default;
  explicit EmulatedGuard(DeviceType) {}
  DeviceType type() const override { return static_type; }
  Device exchangeDevice(Device) const override { return DEVICE; }
  Device getDevice() const override { return DEVICE; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const override { return Stream(Stream::DEFAULT, DEVICE); }
  Stream getDefaultStream(Device device) const override { return getStream(device); }
  Stream exchangeStream(Stream) const override { return getStream(DEVICE); }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
};
}  // namespace
C10_REGISTER_GUARD_IMPL(CUDA, EmulatedGuard)

namespace at {
struct CUDAHooks final : CUDAHooksInterface {  // torch looks for this name
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return 1; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(DeviceIndex) const override {}
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  const Generator& getDefaultGenerator(DeviceIndex) const override { return at::detail::getDefaultCPUGenerator(); }
  Generator getNewGenerator(DeviceIndex) const override { return make_generator<CPUGeneratorImpl>(); }
  Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  bool isPinnedPtr(const void* data) const override { return PinnedAllocator::owns(data); }
  Device getDeviceFromPtr(void*) const override { return DEVICE; }
};
REGISTER_CUDA_HOOKS(CUDAHooks)
}  // namespace at

// ---------------------------------------------------------------- operations

// The same memory as a tensor of another device.
static Tensor on(Device device, const Tensor& tensor) {
  const bool to_host = device.is_cpu();
  auto* owner = new Storage(tensor.storage());
  DataPtr data(owner->mutable_data(), owner, [](void* kept) { delete static_cast<Storage*>(kept); }, device);
  Allocator* allocator = to_host ? GetAllocator(DeviceType::CPU) : &device_memory;
  Storage storage(Storage::use_byte_size_t(), owner->nbytes(), std::move(data), allocator, /*resizable=*/true);
  DispatchKeySet keys(to_host ? DispatchKey::CPU : DispatchKey::CUDA);
  auto made = c10::make_intrusive<TensorImpl>(std::move(storage), keys, tensor.dtype());
  made->set_sizes_and_strides(tensor.sizes(), tensor.strides());
  made->set_storage_offset(tensor.storage_offset());
  return Tensor(std::move(made));
}

static void set_memory(const Tensor& tensor, const Storage& storage, int64_t offset, IntArrayRef size, IntArrayRef stride) {
  auto* own = tensor.unsafeGetTensorImpl();
  own->set_storage_keep_dtype(storage);
  own->set_sizes_and_strides(size, stride);
  own->set_storage_offset(offset);
}

struct Pair {
  Tensor on_host, on_device;
};

static void run_on_host(const c10::OperatorHandle& operation, DispatchKeySet, torch::jit::Stack* stack) {
  const auto& schema = operation.schema();
  std::unordered_map<TensorImpl*, Pair> pairs;  // by the tensor of the host
  std::string host_sizes;
  const bool is_copy = schema.name() == "aten::copy_";
  auto to_host = [&](const Tensor& tensor, bool may_be_on_host = false) {
    if (tensor.defined() && tensor.is_cuda()) {
      Tensor made = on(Device(DeviceType::CPU), tensor);
      pairs[made.unsafeGetTensorImpl()] = {made, tensor};
      return made;
    }
    if (tensor.defined() && tensor.dim() > 0 && !may_be_on_host) host_sizes = c10::str(tensor.sizes());
    return tensor;
  };
  for (size_t i = stack->size() - schema.arguments().size(); i < stack->size(); ++i) {
    auto& value = (*stack)[i];
    if (value.isTensor()) {
      value = to_host(value.toTensor(), is_copy);
    } else if (value.isTensorList()) {
      c10::List<Tensor> moved;
      for (const Tensor& tensor : value.toTensorVector()) moved.push_back(to_host(tensor));
      value = moved;
    } else if (value.isOptionalTensorList()) {  // indices
      c10::List<std::optional<Tensor>> moved;
      for (std::optional<Tensor> tensor : value.toOptionalTensorList())
        moved.push_back(tensor ? std::optional<Tensor>(to_host(*tensor, true)) : std::nullopt);
      value = moved;
    } else if (value.isDevice()) {
      value = Device(DeviceType::CPU);
    }
  }
  TORCH_CHECK(pairs.empty() || host_sizes.empty(), schema.name(),
              ": a tensor ", host_sizes, " is on the cpu, others are on cuda");
  operation.callBoxed(stack);
  for (const auto& entry : pairs) {  // an output may have been resized
    const auto& [on_host, on_device] = entry.second;
    if (on_host.sizes() == on_device.sizes() && on_host.storage().data() == on_device.storage().data()) continue;
    Storage storage = on(DEVICE, on_host).storage();
    set_memory(on_device, storage, on_host.storage_offset(), on_host.sizes(), on_host.strides());
  }
  auto to_device = [&](const Tensor& tensor) {
    if (!tensor.defined() || !tensor.device().is_cpu()) return tensor;
    auto found = pairs.find(tensor.unsafeGetTensorImpl());
    return found == pairs.end() ? on(DEVICE, tensor) : found->second.on_device;
  };
  for (size_t i = stack->size() - schema.returns().size(); i < stack->size(); ++i) {
    auto& value = (*stack)[i];
    if (value.isTensor()) {
      value = to_device(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<Tensor> moved;
      for (const Tensor& tensor : value.toTensorVector()) moved.push_back(to_device(tensor));
      value = moved;
    }
  }
}

namespace emulated {
using MaybeType = std::optional<ScalarType>;
using MaybeLayout = std::optional<Layout>;
using MaybeDevice = std::optional<Device>;
using MaybeBool = std::optional<bool>;
const DispatchKeySet KEYS(DispatchKey::CUDA);

Tensor empty(
    IntArrayRef size, MaybeType type, MaybeLayout, MaybeDevice, MaybeBool, std::optional<MemoryFormat> format) {
  return at::detail::empty_generic(size, &device_memory, KEYS, dtype_or_default(type), format);
}

Tensor empty_strided(
    IntArrayRef size, IntArrayRef stride, MaybeType type, MaybeLayout, MaybeDevice, MaybeBool) {
  return at::detail::empty_strided_generic(size, stride, &device_memory, KEYS, dtype_or_default(type));
}

Tensor as_strided(const Tensor& self, IntArrayRef size, IntArrayRef stride, std::optional<int64_t> offset) {
  return native::as_strided_tensorimpl(self, size, stride, offset);
}

Tensor view(const Tensor& self, IntArrayRef size) { return native::view(self, size); }

Tensor reshape_alias(const Tensor& self, IntArrayRef size, IntArrayRef stride) {
  return native::_reshape_alias(self, size, stride);
}

const Tensor& resize_(const Tensor& self, IntArrayRef size, std::optional<MemoryFormat>) {
  const size_t needed = (c10::multiply_integers(size) + self.storage_offset()) * self.dtype().itemsize();
  auto& storage = self.storage();
  if (storage.nbytes() < needed) {
    DataPtr larger = device_memory.allocate(needed);
    std::memcpy(larger.get(), storage.data(), storage.nbytes());
    storage.set_data_ptr_noswap(std::move(larger));
    storage.set_nbytes(needed);
  }
  self.unsafeGetTensorImpl()->set_sizes_contiguous(size);
  return self;
}

Tensor& set_to_part(Tensor& self, Storage source, int64_t offset, IntArrayRef size, IntArrayRef stride) {
  set_memory(self, source, offset, size, stride);
  return self;
}

Tensor& set_to_storage(Tensor& self, Storage source) {
  set_memory(self, source, 0, {static_cast<int64_t>(source.nbytes() / self.dtype().itemsize())}, {1});
  return self;
}
}  // namespace emulated

TORCH_LIBRARY_IMPL(_, CUDA, library) { library.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_host>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  library.impl("copy_", torch::CppFunction::makeFromBoxedFunction<&run_on_host>());  // torch's own asks for a kernel
  library.impl("empty.memory_format", &emulated::empty);
  library.impl("empty_strided", &emulated::empty_strided);
  library.impl("as_strided", &emulated::as_strided);
  library.impl("view", &emulated::view);
  library.impl("_reshape_alias", &emulated::reshape_alias);
  library.impl("resize_", &emulated::resize_);
  library.impl("set_.source_Storage_storage_offset", &emulated::set_to_part);
  library.impl("set_.source_Storage", &emulated::set_to_storage);
}

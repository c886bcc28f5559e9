// What ThreadSanitizer must be told of gRPC, which is not built with it.
//
// gRPC hands work from thread to thread by means that the sanitizer does not see: starting a batch
// of operations happens before its completion is reported, under the same tag. Without knowing that
// it takes every hand-over for a race. So the few C functions through which operations start and
// complete are interposed here, and say so. Linked into tests of the tsan preset only.
#include <dlfcn.h>
#include <grpc/grpc.h>
#include <link.h>
#include <sanitizer/tsan_interface.h>

#include <cstdint>
#include <utility>
#include <vector>

namespace {

template <typename Function>
Function* Real(const char* name) {
  return reinterpret_cast<Function*>(dlsym(RTLD_NEXT, name));
}

// A completion queue of callbacks calls the tag itself, as a functor. This one stands in for it,
// and runs it after taking over what was known when it was handed in.
struct Functor : grpc_completion_queue_functor {
  explicit Functor(grpc_completion_queue_functor* real) : real(real) {
    functor_run = &Functor::Run;
    inlineable = real->inlineable;
    internal_success = real->internal_success;
    internal_next = real->internal_next;
  }
  static void Run(grpc_completion_queue_functor* functor, int ok) {
    __tsan_acquire(functor);
    auto* self = static_cast<Functor*>(functor);
    grpc_completion_queue_functor* real = self->real;
    delete self;
    real->functor_run(real, ok);
  }
  grpc_completion_queue_functor* const real;
};

// Whether this is the address of code.
bool IsCode(const void* address) {
  static const auto& segments = [] {
    auto* all = new std::vector<std::pair<uintptr_t, uintptr_t>>;
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* data) {
          for (int i = 0; i < info->dlpi_phnum; ++i) {
            const auto& header = info->dlpi_phdr[i];
            if (header.p_type != PT_LOAD || (header.p_flags & PF_X) == 0) continue;
            const uintptr_t begin = info->dlpi_addr + header.p_vaddr;
            static_cast<decltype(all)>(data)->emplace_back(begin, begin + header.p_memsz);
          }
          return 0;
        },
        all);
    return *all;
  }();
  const auto value = reinterpret_cast<uintptr_t>(address);
  for (const auto& [begin, end] : segments) {
    if (value >= begin && value < end) return true;
  }
  return false;
}

// Tags of a queue that is polled begin with a vtable, functors with the function to call.
bool IsFunctor(const void* tag) { return IsCode(*static_cast<const void* const*>(tag)); }

// Their addresses stand for the events.
char server_started;
char call_ended;

}  // namespace

extern "C" {

// What happens inside of libraries that are not instrumented can only be misunderstood.
const char* __tsan_default_options() { return "ignore_noninstrumented_modules=1"; }

// Where there is nothing to interpose: a server's reactor gets OnDone, and what gRPC kept for the
// call is freed, from a thread pool inside of gRPC; and the first thing that a new call does is to
// look whether its handler has an allocator.
const char* __tsan_default_suppressions() {
  return "race:ServerCallback*Impl::CallOnDone\n"
         "race:grpc::internal::Callback*Handler*::Deserialize\n";
}

grpc_call_error grpc_call_start_batch(grpc_call* call, const grpc_op* ops, size_t nops, void* tag,
                                      void* reserved) {
  static auto* real = Real<decltype(grpc_call_start_batch)>("grpc_call_start_batch");
  if (IsFunctor(tag)) tag = new Functor(static_cast<grpc_completion_queue_functor*>(tag));
  __tsan_release(tag);
  return real(call, ops, nops, tag, reserved);
}

grpc_event grpc_completion_queue_next(grpc_completion_queue* cq, gpr_timespec deadline,
                                      void* reserved) {
  static auto* real = Real<decltype(grpc_completion_queue_next)>("grpc_completion_queue_next");
  const grpc_event event = real(cq, deadline, reserved);
  if (event.type == GRPC_OP_COMPLETE) __tsan_acquire(event.tag);
  return event;
}

grpc_event grpc_completion_queue_pluck(grpc_completion_queue* cq, void* tag, gpr_timespec deadline,
                                       void* reserved) {
  static auto* real = Real<decltype(grpc_completion_queue_pluck)>("grpc_completion_queue_pluck");
  const grpc_event event = real(cq, tag, deadline, reserved);
  if (event.type == GRPC_OP_COMPLETE) __tsan_acquire(event.tag);
  return event;
}

// A server knows its services when it starts, every call to one of them begins with a reference and
// ends by giving it back, and the server ends after that.
void grpc_server_start(grpc_server* server) {
  static auto* real = Real<decltype(grpc_server_start)>("grpc_server_start");
  __tsan_release(&server_started);
  real(server);
}

void grpc_call_ref(grpc_call* call) {
  static auto* real = Real<decltype(grpc_call_ref)>("grpc_call_ref");
  __tsan_acquire(&server_started);
  real(call);
}

void grpc_call_unref(grpc_call* call) {
  static auto* real = Real<decltype(grpc_call_unref)>("grpc_call_unref");
  __tsan_release(&call_ended);
  real(call);
}

void grpc_server_destroy(grpc_server* server) {
  static auto* real = Real<decltype(grpc_server_destroy)>("grpc_server_destroy");
  __tsan_acquire(&call_ended);
  real(server);
}

}  // extern "C"

module;
#include <boost/asio/any_io_executor.hpp>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <exception>
#include <expected>
#include <fcntl.h>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <pthread.h>
#include <string>
#include <system_error>
#include <thread>
#include <unistd.h>
#include <utility>
#include <variant>
#include <vector>
module cppvmm.vcpu_group:group.impl;
import :group;
import cppvmm.vcpu;

namespace cppvmm {

std::uint64_t vcpu_ticks_per_second() { return static_cast<std::uint64_t>(sysconf(_SC_CLK_TCK)); }

// Fields 14 and 15 of the calling thread's stat, counted from the one after the name, which may hold anything but its
// own last parenthesis.
static std::optional<VcpuTicks> own_ticks() {
  const FileDescriptor file(open("/proc/thread-self/stat", O_RDONLY | O_CLOEXEC));
  char line[1024];
  const ssize_t length = file ? read(file.number(), line, sizeof line - 1) : -1;
  if (length <= 0) return std::nullopt;
  line[length] = '\0';
  const char* const name_end = std::strrchr(line, ')');
  if (name_end == nullptr) return std::nullopt;
  unsigned long long user = 0;
  unsigned long long system = 0;
  if (std::sscanf(name_end + 1, " %*c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %llu %llu", &user, &system) != 2)
    return std::nullopt;
  return VcpuTicks{.user = user, .system = system};
}

static std::chrono::nanoseconds own_time() {
  timespec time{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return std::chrono::seconds(time.tv_sec) + std::chrono::nanoseconds(time.tv_nsec);
}

struct VcpuGroup::State {
  struct Member {
    Vcpu vcpu;
    StopHandle handle;
    std::thread thread;
    bool ended = false;
  };

  ExitHandler handler;
  executor_type executor;

  std::mutex mutex;
  std::condition_variable all_ended;
  std::vector<Member> members; // fixed in number; each vCPU belongs to its thread until that has ended
  VcpuEnds ends;
  std::size_t running = 0;
  bool stopping = false;
  bool taken = false;
  std::vector<std::function<void(const VcpuEnds&)>> callbacks;

  ~State() {
    stop();
    for (Member& member : members)
      if (member.thread.joinable()) member.thread.join();
  }

  void stop() {
    const std::lock_guard lock(mutex);
    stopping = true;
    // One that has ended gets no request: it would be left over for the vCPU's next use.
    for (const Member& member : members)
      if (!member.ended) member.handle.request_stop();
  }

  void run(std::size_t index);
  VcpuEnd run_vcpu(Vcpu& vcpu);
  void finish(std::size_t index, VcpuEnd end);
};

// Until the handler has enough, a stop request comes, or something fails.
VcpuEnd VcpuGroup::State::run_vcpu(Vcpu& vcpu) {
  VcpuEnd end{.id = vcpu.id(), .reason = VcpuEndReason::handler};
  for (;;) {
    const auto exit = vcpu.run();
    if (!exit) {
      end.reason = VcpuEndReason::failed;
      end.error = exit.error();
      return end;
    }
    if (const auto* const interrupted = std::get_if<Interrupted>(&*exit)) {
      if (!interrupted->stop_requested) continue;
      end.reason = VcpuEndReason::stopped;
      return end;
    }
    try {
      switch (handler(vcpu, *exit)) {
      case VcpuAction::resume:
        break;
      case VcpuAction::end_vcpu:
        return end;
      case VcpuAction::stop_group:
        stop();
        return end;
      }
    } catch (...) {
      end.reason = VcpuEndReason::threw;
      end.exception = std::current_exception();
      return end;
    }
  }
}

// The group whose thread this is.
static thread_local const void* own_group = nullptr;

void VcpuGroup::State::run(std::size_t index) {
  own_group = this;
  Vcpu& vcpu = members[index].vcpu;
  pthread_setname_np(pthread_self(), ("vcpu:" + std::to_string(vcpu.id())).c_str());
  VcpuEnd end = run_vcpu(vcpu);
  if (end.reason == VcpuEndReason::failed || end.reason == VcpuEndReason::threw) stop();
  end.time = own_time();
  end.ticks = own_ticks();
  finish(index, std::move(end));
}

void VcpuGroup::State::finish(std::size_t index, VcpuEnd end) {
  std::vector<std::function<void(const VcpuEnds&)>> due;
  {
    const std::lock_guard lock(mutex);
    Member& member = members[index];
    member.ended = true;
    member.vcpu.acknowledge_stop(); // came while the vCPU was ending for another reason
    ends[index] = std::move(end);
    if (--running != 0) return;
    due.swap(callbacks);
    all_ended.notify_all();
  }
  for (const auto& callback : due)
    callback(ends); // nobody writes to it any more
}

VcpuGroup::VcpuGroup(std::unique_ptr<State> state) : state_(std::move(state)) {}
VcpuGroup::VcpuGroup(VcpuGroup&&) noexcept = default;
VcpuGroup& VcpuGroup::operator=(VcpuGroup&&) noexcept = default;
VcpuGroup::~VcpuGroup() = default;

KvmResult<VcpuGroup> VcpuGroup::start(std::vector<Vcpu> vcpus, ExitHandler handler, executor_type executor) {
  auto state = std::make_unique<State>();
  state->handler = std::move(handler);
  state->executor = std::move(executor);
  state->members.reserve(vcpus.size());
  for (Vcpu& vcpu : vcpus) {
    StopHandle handle = vcpu.stop_handle();
    state->members.push_back({.vcpu = std::move(vcpu), .handle = std::move(handle), .thread = {}});
  }
  state->ends.resize(vcpus.size());
  state->running = vcpus.size();
  for (std::size_t i = 0; i < state->members.size(); ++i) {
    try {
      state->members[i].thread = std::thread([state = state.get(), i] { state->run(i); });
    } catch (const std::system_error& error) {
      return std::unexpected(KvmError{
          .code = KvmErrc::os, .os_error = error.code().value(), .operation = "start of a vCPU's thread", .value = i});
    }
  }
  return VcpuGroup(std::move(state));
}

VcpuGroup::executor_type VcpuGroup::get_executor() const { return state_ ? state_->executor : executor_type(); }

void VcpuGroup::stop() {
  if (state_) state_->stop();
}

bool VcpuGroup::ended() const {
  if (!state_) return true;
  const std::lock_guard lock(state_->mutex);
  return state_->running == 0;
}

static std::unexpected<KvmError> bad_state(const char* operation) {
  return std::unexpected(KvmError{.code = KvmErrc::bad_state, .operation = operation});
}

KvmResult<VcpuEnds> VcpuGroup::wait() {
  if (!state_) return bad_state("VcpuGroup::wait");
  if (own_group == state_.get()) return bad_state("VcpuGroup::wait from the group's own handler");
  std::unique_lock lock(state_->mutex);
  state_->all_ended.wait(lock, [&] { return state_->running == 0; });
  return state_->ends;
}

void VcpuGroup::when_ended(std::function<void(const VcpuEnds&)> callback) {
  if (!state_) {
    callback({});
    return;
  }
  {
    const std::lock_guard lock(state_->mutex);
    if (state_->running != 0) {
      state_->callbacks.push_back(std::move(callback));
      return;
    }
  }
  callback(state_->ends);
}

KvmResult<std::vector<Vcpu>> VcpuGroup::take_vcpus() {
  if (!state_) return bad_state("VcpuGroup::take_vcpus");
  const std::lock_guard lock(state_->mutex);
  if (state_->running != 0 || state_->taken) return bad_state("VcpuGroup::take_vcpus");
  state_->taken = true;
  std::vector<Vcpu> vcpus;
  vcpus.reserve(state_->members.size());
  for (State::Member& member : state_->members)
    vcpus.push_back(std::move(member.vcpu));
  return vcpus;
}

} // namespace cppvmm

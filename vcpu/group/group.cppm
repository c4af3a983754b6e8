module;
#include <boost/asio/any_io_executor.hpp>
#include <boost/asio/associated_executor.hpp>
#include <boost/asio/async_result.hpp>
#include <boost/asio/execution/outstanding_work.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/prefer.hpp>
#include <boost/asio/system_executor.hpp>
#include <chrono>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <optional>
#include <utility>
#include <vector>
export module cppvmm.vcpu_group:group;
import cppvmm.vcpu;

namespace cppvmm {

/// What an exit handler wants next.
export enum class VcpuAction : std::uint8_t {
  resume,     ///< Run this vCPU on.
  end_vcpu,   ///< This vCPU is done; the others go on.
  stop_group, ///< This vCPU is done, and the others stop.
};

/// Looks at an exit and answers it (Vcpu::complete_*, refuse_*). Called on the vCPU's own thread, for different vCPUs
/// at the same time. Interrupted exits do not come here.
export using ExitHandler = std::function<VcpuAction(Vcpu&, const Exit&)>;

/// Why a vCPU's thread ended.
export enum class VcpuEndReason : std::uint8_t {
  handler, ///< The handler said end_vcpu or stop_group.
  stopped, ///< VcpuGroup::stop, or another vCPU's stop_group, failure or exception, or a StopHandle.
  failed,  ///< Vcpu::run failed; `error` says how. The group stops.
  threw,   ///< The handler threw `exception`. The group stops.
};

/// Processor time of a thread, in clock ticks: of vcpu_ticks_per_second, as in fields 14 and 15 of
/// /proc/thread-self/stat (proc(5)). The user time holds the time in the guest.
export struct VcpuTicks {
  std::uint64_t user = 0;
  std::uint64_t system = 0;
};

/// sysconf(_SC_CLK_TCK).
export [[nodiscard]] std::uint64_t vcpu_ticks_per_second();

/// How one vCPU's thread ended.
export struct VcpuEnd {
  std::uint32_t id = 0; ///< Vcpu::id.
  VcpuEndReason reason{};
  std::optional<KvmError> error{};
  std::exception_ptr exception{};
  std::chrono::nanoseconds time{};  ///< The processor time of its thread, finer than ticks: CLOCK_THREAD_CPUTIME_ID.
  std::optional<VcpuTicks> ticks{}; ///< Taken by the thread as its last act; nothing when /proc cannot be read.
};

/// The ends of all vCPUs, in the order in which they were given to the group.
export using VcpuEnds = std::vector<VcpuEnd>;

/// A thread for each vCPU, which runs it and hands its exits to a handler. All members may be called from any thread,
/// but the moves, the destructor and take_vcpus from one at a time.
export class VcpuGroup {
public:
  using executor_type = boost::asio::any_io_executor;

  /// Starts the threads. `executor` is where async_wait completes, unless its handler has one of its own. An `os` error
  /// when a thread cannot be made; those made before have then ended.
  [[nodiscard]] static KvmResult<VcpuGroup> start(std::vector<Vcpu> vcpus, ExitHandler handler,
                                                  executor_type executor = boost::asio::system_executor());

  VcpuGroup(VcpuGroup&&) noexcept;
  /// Stops and joins what it held.
  VcpuGroup& operator=(VcpuGroup&&) noexcept;
  /// Stops the vCPUs and joins their threads: not from the handler.
  ~VcpuGroup();

  [[nodiscard]] executor_type get_executor() const;

  /// Asks every vCPU to stop and returns at once; also from the handler, before the threads run, and after they ended.
  void stop();

  /// Whether every thread has ended its vCPU.
  [[nodiscard]] bool ended() const;

  /// Blocks until every vCPU has ended. bad_state from the handler, which would wait for itself.
  [[nodiscard]] KvmResult<VcpuEnds> wait();

  /// Completes with VcpuEnds when every vCPU has ended, by a post to the handler's executor (else get_executor()),
  /// which has outstanding work until then. Takes any completion token: a callback, use_future, use_awaitable. Waiting
  /// does not stop anything, and cannot be cancelled but by stop().
  template <boost::asio::completion_token_for<void(VcpuEnds)> Token>
  auto async_wait(Token&& token) {
    return boost::asio::async_initiate<Token, void(VcpuEnds)>(
        [this](auto handler) {
          auto executor = boost::asio::prefer(boost::asio::get_associated_executor(handler, get_executor()),
                                              boost::asio::execution::outstanding_work.tracked);
          auto shared = std::make_shared<decltype(handler)>(std::move(handler));
          when_ended([executor = std::move(executor), shared = std::move(shared)](const VcpuEnds& ends) {
            boost::asio::post(executor, [shared, ends] { std::move (*shared)(ends); });
          });
        },
        token);
  }

  /// Gives the vCPUs back, for a look at their registers or another group. bad_state before all have ended, and when
  /// they were taken already.
  [[nodiscard]] KvmResult<std::vector<Vcpu>> take_vcpus();

private:
  struct State;
  explicit VcpuGroup(std::unique_ptr<State> state);

  // Calls `callback` once, on the last thread to end, or here and now when all have ended.
  void when_ended(std::function<void(const VcpuEnds&)> callback);

  std::unique_ptr<State> state_;
};

} // namespace cppvmm

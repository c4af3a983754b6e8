#include "layout.hpp"

#include <algorithm>
#include <array>
#include <boost/asio/io_context.hpp>
#include <boost/asio/steady_timer.hpp>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <unistd.h>
#include <utility>
#include <variant>
#include <vector>

#include "ram.hpp"
#include "zeroing_guest.hpp"

namespace cppvmm::boot {
namespace {

/// Where vCPUs wait for the one that asks (zeroing::gate_port).
class Gate {
public:
  void open() {
    {
      const std::scoped_lock lock(mutex_);
      open_ = true;
    }
    opened_.notify_all();
  }
  void close() {
    const std::scoped_lock lock(mutex_);
    open_ = false;
  }
  /// Returns when the gate is open, and after some milliseconds anyway: a vCPU that is to stop must run to learn it.
  void wait() {
    std::unique_lock lock(mutex_);
    opened_.wait_for(lock, std::chrono::milliseconds(20), [this] { return open_; });
  }

private:
  std::mutex mutex_;
  std::condition_variable opened_;
  bool open_ = false;
};

/// The value of a 32-bit OUT to `port`, if the exit is one.
std::optional<std::uint32_t> written_to(std::uint16_t port, const Exit& exit) {
  const auto* out = std::get_if<IoOut>(&exit);
  if (out == nullptr || out->port != port || out->data.size() != sizeof(std::uint32_t)) return std::nullopt;
  std::uint32_t value;
  std::memcpy(&value, out->data.data(), sizeof value);
  return value;
}

class ZeroingGuest final : public Guest {
public:
  ZeroingGuest(const Options& options, Layout layout) : options_(options), layout_(std::move(layout)) {}

  [[nodiscard]] const std::vector<zeroing::Pages>& ram() const override { return layout_.ram; }
  [[nodiscard]] zeroing::Pages lives_in() const override { return layout_.lives_in(); }

  [[nodiscard]] Result<void> load(const GuestMemory& memory) override {
    memory_ = &memory;
    if (options_.idle) tell(offsetof(zeroing::BootInfo, ram_ranges), std::uint32_t{0});
    if (options_.balloon_target)
      tell(offsetof(zeroing::BootInfo, balloon_target), *options_.balloon_target / zeroing::page_bytes);
    if (auto loaded = memory.load(GuestAddress(zeroing::image_address), layout_.block); !loaded)
      return failure(loaded.error().message());
    return {};
  }

  [[nodiscard]] Result<void> add_devices(Vm& /*vm*/) override {
    for (Gate& gate : gates_)
      gate.close();
    const std::scoped_lock lock(mutex_);
    exit_code_.reset();
    return {};
  }

  [[nodiscard]] Result<void> set_registers(Vcpu& vcpu) override {
    constexpr std::uint16_t code_selector = 0x08;
    constexpr std::uint16_t data_selector = 0x10;
    auto special = vcpu.special_registers();
    if (!special) return failure(special.error().message());
    special->cs = code64_segment(code_selector);
    special->ds = special->es = special->fs = special->gs = special->ss = data_segment(data_selector);
    special->cr0 = cr0_pe | cr0_mp | cr0_et | cr0_ne | cr0_wp | cr0_pg;
    special->cr3 = layout_.page_tables;
    special->cr4 = cr4_pae;
    special->efer = efer_lme | efer_lma;
    if (auto set = vcpu.set_special_registers(*special); !set) return failure(set.error().message());

    Registers registers;
    registers.rip = zeroing::image_address;
    registers.rdi = layout_.boot_info;
    registers.rsi = vcpu.id();
    registers.rsp = layout_.stack_top(vcpu.id());
    if (auto set = vcpu.set_registers(registers); !set) return failure(set.error().message());
    return {};
  }

  void begin(boost::asio::io_context& io) override {
    timer_.emplace(io);
    show_progress();
  }

  [[nodiscard]] std::expected<VcpuAction, std::string> on_exit(Vcpu&, const Exit& exit) override {
    if (const auto action = written_to(zeroing::gate_port, exit)) {
      using enum zeroing::GateAction;
      const auto what = static_cast<zeroing::GateAction>(*action);
      Gate& gate = gates_.at(what == wait_zeroed || what == open_zeroed ? 1 : 0);
      if (what == open || what == open_zeroed)
        gate.open();
      else
        gate.wait();
      return VcpuAction::resume;
    }
    if (const auto code = written_to(zeroing::exit_port, exit)) {
      const std::scoped_lock lock(mutex_);
      exit_code_ = code;
      return VcpuAction::stop_group;
    }
    if (std::holds_alternative<Hlt>(exit)) return VcpuAction::end_vcpu;
    if (std::holds_alternative<Shutdown>(exit)) return std::unexpected("the guest crashed (triple fault)");
    return std::unexpected("an exit that this guest has no reason for: " + describe_exit(exit));
  }

  void end() override {
    timer_.reset();
    if (terminal_ && progress_shown_) std::fprintf(stderr, "\r\033[K");
    progress_shown_ = false;
  }

  [[nodiscard]] Result<void> collect(const MemoryMap& map, RunFigures& figures) override {
    const std::scoped_lock lock(mutex_);
    if (!exit_code_) return failure("the guest halted before it was done");
    if (*exit_code_ != static_cast<std::uint32_t>(zeroing::ExitCode::done))
      return failure("the guest gave up with exit code " + std::to_string(*exit_code_));
    zeroing::Report& report = figures.guest.emplace();
    if (auto read = map.read(GuestAddress(layout_.report), std::as_writable_bytes(std::span(&report, 1))); !read)
      return failure(read.error().message());
    if (!options_.audit) return {};
    auto nonzero = nonzero_outside_the_guest(map);
    if (!nonzero) return failure(std::move(nonzero.error()));
    figures.nonzero_pages_at_end = figures.nonzero_pages_at_end.value_or(0) + *nonzero;
    return {};
  }

private:
  /// Puts a field of the BootInfo into what the guest starts with.
  template <class T>
  void tell(std::size_t offset, T value) {
    std::memcpy(layout_.block.data() + (layout_.boot_info - zeroing::image_address) + offset, &value, sizeof value);
  }

  [[nodiscard]] std::uint64_t report_word(std::size_t offset) const {
    return memory_->read_value<std::uint64_t>(GuestAddress(layout_.report + offset)).value_or(0);
  }

  /// Four times a second on a terminal; else a line every ten seconds, which a short run never sees.
  void show_progress() {
    timer_->expires_after(terminal_ ? std::chrono::milliseconds(250) : std::chrono::seconds(10));
    timer_->async_wait([this](const boost::system::error_code& error) {
      if (error || !timer_) return; // ended, while this was on its way
      const std::uint64_t planned = report_word(offsetof(zeroing::Report, planned_pages));
      const std::uint64_t done = std::min(report_word(offsetof(zeroing::Report, cursor)), planned);
      const auto mebibytes = [](std::uint64_t pages) { return static_cast<unsigned long long>((pages + 128) >> 8); };
      std::fprintf(stderr, "%s", terminal_ ? "\r\033[K" : "");
      if (planned == 0)
        std::fprintf(stderr, "cppvmm-boot: the guest finds out what to zero");
      else
        std::fprintf(stderr, "cppvmm-boot: the guest zeroes its memory, %llu of %llu MiB", mebibytes(done),
                     mebibytes(planned));
      std::fprintf(stderr, "%s", terminal_ ? "" : "\n");
      std::fflush(stderr);
      progress_shown_ = true;
      show_progress();
    });
  }

  [[nodiscard]] std::expected<std::uint64_t, std::string> nonzero_outside_the_guest(const MemoryMap& map) const {
    const zeroing::Pages lives_in = layout_.lives_in();
    const std::uint64_t after = lives_in.first + lives_in.count;
    const std::array<ReportedRange, 2> to_be_zero = {{{0, lives_in.first}, {after, layout_.end / page_size - after}}};
    const auto ram = audited_ram(map);
    if (!ram) return std::unexpected(ram.error());
    const auto found = audit(ram->regions, to_be_zero);
    if (!found) return std::unexpected(found.error());
    return found->unsound_pages;
  }

  const Options& options_;
  Layout layout_;
  const GuestMemory* memory_ = nullptr;
  std::array<Gate, 2> gates_;
  std::mutex mutex_;
  std::optional<std::uint32_t> exit_code_; // by mutex_
  std::optional<boost::asio::steady_timer> timer_;
  bool terminal_ = isatty(STDERR_FILENO) == 1;
  bool progress_shown_ = false;
};

} // namespace

Result<std::unique_ptr<Guest>> make_zeroing_guest(const Options& options) {
  auto layout = make_layout(options.memory_bytes, options.cpus, zeroing_guest_image());
  if (!layout) return failure(std::move(layout.error()));
  return std::make_unique<ZeroingGuest>(options, std::move(*layout));
}

} // namespace cppvmm::boot

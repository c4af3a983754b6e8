#include "machine.hpp"

#include "host_peak.hpp"
#include "layout.hpp"

#include <algorithm>
#include <array>
#include <atomic>
#include <boost/asio/executor_work_guard.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/signal_set.hpp>
#include <boost/asio/thread_pool.hpp>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <ratio>
#include <span>
#include <stop_token>
#include <sys/utsname.h>
#include <thread>
#include <utility>
#include <variant>
#include <vector>

#include "answer_figures.hpp"
#include "guest.hpp"
#include "host_memory_log.hpp"
#include "linux_guest.hpp"
#include "ram.hpp"
#include "saved_machine.hpp"
#include "trace_file.hpp"
#include "zeroing_guest.hpp"

namespace cppvmm::boot {
namespace {

using Clock = std::chrono::steady_clock;
using Milliseconds = std::chrono::duration<double, std::milli>;

std::string explain_open(const std::string& path, const KvmError& error) {
  switch (error.os_error) {
  case ENOENT:
  case ENODEV:
  case ENXIO:
    return path + (error.os_error == ENOENT ? " does not exist" : " has no driver") +
           ": load KVM (modprobe kvm_intel or kvm_amd) with virtualisation switched on in the firmware; in a virtual "
           "machine, its host must allow nested virtualisation";
  case EACCES:
  case EPERM:
    return "no permission to open " + path +
           ": join its group (sudo usermod -aG kvm \"$USER\", then log in again), or " +
           "hand it to the container (--device " + path + ")";
  case ENOTTY:
    return path + " is not KVM's device: use /dev/kvm";
  default:
    return path + " is unusable: " + error.message();
  }
}

/// What the vCPU threads find out. Its members are used by any of them.
class Findings {
public:
  /// The first failure counts: the others follow from it.
  void fail(std::string text) {
    const std::scoped_lock lock(mutex_);
    if (!failure_) failure_ = std::move(text);
  }
  void answered(std::uint32_t boot, AnswerFigures answer) {
    const std::scoped_lock lock(mutex_);
    answers_.add(boot, std::move(answer));
  }
  [[nodiscard]] std::optional<std::string> failure() const {
    const std::scoped_lock lock(mutex_);
    return failure_;
  }
  [[nodiscard]] AnswerLog answers() const {
    const std::scoped_lock lock(mutex_);
    return answers_;
  }

private:
  mutable std::mutex mutex_;
  std::optional<std::string> failure_;
  AnswerLog answers_;
};

/// Adds to `figures` what only a look at the memory tells; an error is one line.
std::expected<void, std::string> look_at_memory(const MemoryMap& map, AnswerFigures& figures,
                                                const std::stop_token& stop) {
  const auto start = Clock::now();
  std::uint64_t huge = 0;
  for (const auto& region : map.regions()) {
    const auto bytes = region.huge_page_bytes();
    if (!bytes) return std::unexpected("audit: " + bytes.error().message());
    huge += *bytes;
  }
  auto ram = audited_ram(map);
  if (!ram) return std::unexpected(std::move(ram.error()));
  auto audited_pages = audit(ram->regions, figures.ranges, stop);
  if (!audited_pages) return std::unexpected(std::move(audited_pages.error()));
  figures.transparent_huge_bytes = huge;
  figures.audit = *audited_pages;
  figures.audit_ms = Milliseconds(Clock::now() - start).count();
  return {};
}

/// Pages that the guest gave back, for the picture: no more than a number of ranges, which what comes later has to fit
/// among. For several vCPUs at the same time.
class ReturnedPages {
public:
  void add(const PageSet& pages) noexcept {
    constexpr std::size_t most_ranges = 16'384;
    const std::scoped_lock lock(mutex_);
    if (pages_.range_count() + pages.range_count() > most_ranges) return;
    try {
      pages_.add(pages);
    } catch (const std::bad_alloc&) {
      pages_ = {}; // the picture tells less
    }
  }
  void clear() {
    const std::scoped_lock lock(mutex_);
    pages_ = {};
  }
  [[nodiscard]] PageSet pages() const {
    const std::scoped_lock lock(mutex_);
    return pages_;
  }

private:
  mutable std::mutex mutex_;
  PageSet pages_;
};

/// Called on a vCPU's thread between the answer and the guest's next instruction. The audit has a thread of its own,
/// so that the vCPU's ticks are those of an answer without it.
void on_answer(const BootZeroedAnswer& answer, std::uint32_t boot, const Options& options, const MemoryMap& map,
               const ReturnedPages& returned, Findings& findings, const std::stop_token& stop) noexcept {
  try {
    AnswerFigures figures = describe(answer);
    if (!options.map.empty()) figures.picture = picture_of(answer, returned.pages());
    if (options.audit) {
      std::expected<void, std::string> looked;
      std::thread([&] {
        try {
          looked = look_at_memory(map, figures, stop);
        } catch (const std::exception& error) {
          looked = std::unexpected(std::string("audit: ") + error.what());
        }
      }).join();
      if (!looked) findings.fail(std::move(looked.error()));
    }
    findings.answered(boot, std::move(figures));
  } catch (const std::exception& error) {
    findings.fail(std::string("audit: ") + error.what());
  }
}

void add(HeatFigures& sum, const HeatCounts& counts) {
  sum.cold_pages += counts.cold_pages;
  sum.hot_pages += counts.hot_pages;
  sum.discard_pages += counts.discard_pages;
  sum.freed_pages += counts.done.freed_pages;
  sum.cleared_pages += counts.done.cleared_pages;
  sum.advised_pages += counts.done.advised_pages;
  sum.kept_pages += counts.done.kept_pages;
  sum.failed_pages += counts.done.failed_pages;
}

EnlightenmentBits bits_in(const std::vector<CpuidEntry>& leaves) {
  EnlightenmentBits bits;
  if (const auto* const features = find_cpuid(leaves, hv_cpuid_features))
    bits = {.eax = features->eax, .ebx = features->ebx, .edx = features->edx};
  if (const auto* const hints = find_cpuid(leaves, hv_cpuid_recommendations)) bits.hints = hints->eax;
  return bits;
}

void keep_only(std::vector<CpuidEntry>& leaves, const EnlightenmentBits& bits) {
  for (CpuidEntry& entry : leaves) {
    if (entry.function == hv_cpuid_features) {
      entry.eax &= bits.eax;
      entry.ebx &= bits.ebx;
      entry.edx &= bits.edx;
    }
    if (entry.function == hv_cpuid_recommendations) {
      entry.eax &= bits.hints;
      entry.ebx = 0xFFFF'FFFF; // a spinlock is never to be told of
    }
  }
}

/// All that a guest of the transport `user` can have: the minimal set, and time.
std::vector<CpuidEntry> user_leaves(const Vcpu& vcpu, const HvOptions& options) {
  std::vector<CpuidEntry> leaves;
  for (const HvCpuidLeaf& leaf : hv_cpuid_leaves(options, user_time(vcpu)))
    leaves.push_back({.function = leaf.function, .eax = leaf.eax, .ebx = leaf.ebx, .ecx = leaf.ecx, .edx = leaf.edx});
  return leaves;
}

/// The MSRs of a reset and of a crash, whose events nobody handles here.
void leave_out_unhandled(std::vector<CpuidEntry>& leaves) {
  for (CpuidEntry& entry : leaves) {
    if (entry.function != hv_cpuid_features) continue;
    entry.eax &= ~(1U << 7);
    entry.edx &= ~(1U << 10);
  }
}

Hypercalls used_for(HypercallTransport transport) {
  switch (transport) {
  case HypercallTransport::kernel:
    return Hypercalls::kernel;
  case HypercallTransport::split:
    return Hypercalls::split;
  case HypercallTransport::user:
    break;
  }
  return Hypercalls::user;
}

/// Whether a guest here can have addresses up to the end of its RAM.
Result<void> check_address_bits(std::span<const CpuidEntry> cpuid, const std::vector<zeroing::Pages>& ram) {
  const std::uint64_t end = (ram.back().first + ram.back().count) * page_size;
  // CPUID 0x80000008.EAX[7:0]: physical address bits; 36 without it (Intel SDM vol. 1, 3.3.1).
  const auto* leaf = find_cpuid(cpuid, 0x8000'0008);
  const unsigned bits = leaf != nullptr ? leaf->eax & 0xFF : 36;
  if (((end - 1) >> bits) == 0) return {};
  return failure("--memory is too much: guests here have " + std::to_string(bits) + " physical address bits");
}

/// Whether what KVM holds of a vCPU's MSRs is to be traced.
enum class MsrTrace : std::uint8_t { none, due, done };

/// What a power cycle replaces: all but the memory. A new VM, and not the old one set back: of what KVM keeps of a VM
/// (interrupt controllers, timers, MSRs, events and exits that are pending) some has no call that sets it back, and all
/// of it would have to be known here, on every kernel.
struct Powered {
  std::unique_ptr<Vm> vm;
  std::optional<DirtyLog> dirty_log;
  std::once_flag preparations_ended;
  std::optional<Hyperv> hyperv;
  std::vector<Vcpu> vcpus;                                           ///< While they do not run.
  std::array<std::atomic<MsrTrace>, zeroing::max_cpus> msr_traces{}; ///< By vCPU.
};

class Machine {
public:
  explicit Machine(const Options& options) : options_(options) {}

  Result<void> build() {
    auto kvm = Kvm::open(options_.kvm_device.c_str());
    if (!kvm) return failure(explain_open(options_.kvm_device, kvm.error()));
    kvm_.emplace(std::move(*kvm));
    auto cpuid = kvm_->supported_cpuid();
    if (!cpuid) return failure(cpuid.error().message());
    cpuid_ = std::move(*cpuid);
    if (auto made = options_.restore.empty() ? make_guest() : read_saved(); !made) return made;
    figures_.options = options_;
    figures_.vcpu_ticks.assign(options_.cpus, TickFigures());
    figures_.vcpu_us.assign(options_.cpus, 0);
    if (!options_.trace.empty()) {
      auto trace = TraceFile::create(options_);
      if (!trace) return failure("--trace: " + trace.error());
      trace_ = std::move(*trace);
    }
    return power_on();
  }

  Result<RunFigures> run() {
    signals_.add(SIGINT);
    signals_.add(SIGTERM);
    signals_.async_wait([&](const boost::system::error_code& error, int number) {
      if (!error) interrupt(number);
    });
    if (!options_.host_memory_log.empty()) {
      auto log = HostMemoryLog::start(options_.host_memory_log, *memory_);
      if (!log) return failure(log.error());
      memory_log_ = std::move(*log);
    }
    if (auto noted = note_start(); !noted) return std::unexpected(std::move(noted.error()));
    const auto started = Clock::now();
    start();
    io_.run();
    const auto wall = Clock::now() - started;
    if (peak_) figures_.host_peak_bytes = peak_->growth();

    if (memory_log_)
      if (auto finished = memory_log_->finish(); !finished) findings_.fail(finished.error());
    if (trace_ && !trace_->finish()) findings_.fail("cannot write " + options_.trace);
    if (signal_ != 0) return std::unexpected(interrupted());
    if (auto text = findings_.failure()) return std::unexpected(after_answers({.text = std::move(*text)}));
    figures_.wall_ms = Milliseconds(wall).count();
    auto collected = collect();
    if (!collected) return std::unexpected(after_answers(std::move(collected.error())));
    return collected;
  }

private:
  Result<void> make_guest() {
    auto guest = options_.kernel.empty() ? make_zeroing_guest(options_) : make_linux_guest(options_);
    if (!guest) return std::unexpected(std::move(guest.error()));
    guest_ = std::move(*guest);
    return make_memory();
  }

  Result<void> make_memory() {
    if (auto fits = check_address_bits(cpuid_, guest_->ram()); !fits) return fits;
    if (options_.cpus > kvm_->capabilities().max_vcpus)
      return failure("--cpus is too many: KVM gives a VM at most " + std::to_string(kvm_->capabilities().max_vcpus));

    auto ram = make_ram(options_, guest_->ram());
    if (!ram) return failure(std::move(ram.error()));
    mappings_ = std::move(ram->mappings);
    memory_ = std::make_unique<GuestMemory>(std::move(ram->map));
    if (auto prepared = prepare_ram(options_, *memory_->snapshot()); !prepared)
      return failure(std::move(prepared.error()));
    return {};
  }

  /// Memory and options of a machine that was saved; the rest waits for its parts to be made.
  Result<void> read_saved() {
    auto saved = read_machine(
        options_.restore, [this](const Options& of_file) -> std::expected<const GuestMemory*, std::string> {
          if (!is_memory_size(of_file.memory_bytes) || of_file.cpus == 0 || of_file.cpus > zeroing::max_cpus)
            return std::unexpected(options_.restore + " is damaged: no machine is of this size");
          options_.memory_bytes = of_file.memory_bytes;
          options_.cpus = of_file.cpus;
          options_.hypercalls = of_file.hypercalls;
          options_.enlightenments = of_file.enlightenments;
          options_.kernel = of_file.kernel;
          guest_ = make_restored_guest(options_);
          if (auto made = make_memory(); !made) return std::unexpected(std::move(made.error().text));
          return memory_.get();
        });
    if (!saved) return failure("--restore: " + saved.error());
    saved_.emplace(std::move(*saved));
    return {};
  }

  // What follows, to `restart`, is done by the thread that runs io_.

  void start() {
    guest_->begin(io_);
    auto group = VcpuGroup::start(
        std::move(power_->vcpus), [this](Vcpu& vcpu, const Exit& exit) { return on_exit(vcpu, exit); },
        io_.get_executor());
    if (!group) {
      findings_.fail("no vCPU threads: " + group.error().message());
      return finish();
    }
    group_.emplace(std::move(*group));
    group_->async_wait([this](const VcpuEnds& ends) {
      note(ends);
      if (auto taken = take_vcpus(); !taken) findings_.fail(std::move(taken.error()));
      if (signal_ == 0 && !findings_.failure() && guest_->is_to_be_saved()) {
        if (auto saved = save(); !saved) findings_.fail("--save: " + saved.error());
        return finish();
      }
      if (!options_.save.empty() && figures_.resets == options_.resets)
        findings_.fail("--save: the guest has not said \"" + options_.save_at + "\"");
      if (signal_ != 0 || findings_.failure() || figures_.resets == options_.resets) return finish();
      restart();
    });
  }

  /// Nothing is left for io_ to do.
  void finish() {
    guest_->end();
    signals_.cancel();
    signals_.clear(); // what is left to do may simply be killed
  }

  void interrupt(int number) {
    signals_.clear(); // a second one kills
    signal_ = number;
    // The guest's memory can take long to discard, and longer to populate, and has nobody to be left to in good order.
    if (restarting_) {
      const Failure why = interrupted();
      std::fprintf(stderr, "cppvmm-boot: %s\n", why.text.c_str());
      std::_Exit(why.status);
    }
    stop_.request_stop();
    if (group_) group_->stop();
  }

  [[nodiscard]] Failure interrupted() const {
    return after_answers({.status = 128 + signal_, .text = "interrupted, no figures were written"});
  }

  /// No figures are written of a run that fails; but an unsound answer may be why it did.
  [[nodiscard]] Failure after_answers(Failure why) const {
    if (const auto unsound = find_unsound(findings_.answers())) why.text = *unsound + "; then: " + why.text;
    return why;
  }

  /// Every vCPU has ended. A power cycle follows on another thread, so that signals are heard meanwhile.
  void restart() {
    guest_->end();
    restarting_ = true;
    boost::asio::post(helpers_, [this, work = boost::asio::make_work_guard(io_)] {
      try {
        if (auto cycled = power_cycle(); !cycled) findings_.fail(std::move(cycled.error().text));
      } catch (const std::exception& error) {
        findings_.fail(std::string("reset: ") + error.what());
      }
      boost::asio::post(io_, [this] {
        restarting_ = false;
        if (findings_.failure()) return finish();
        start();
      });
    });
  }

  /// Adds up what is counted of a boot.
  void note(const VcpuEnds& ends) {
    for (const auto& end : ends) {
      if (end.error) findings_.fail("vCPU " + std::to_string(end.id) + ": " + end.error->message());
      if (end.exception != nullptr) {
        try {
          std::rethrow_exception(end.exception);
        } catch (const std::exception& error) {
          findings_.fail("vCPU " + std::to_string(end.id) + ": " + error.what());
        }
      }
      figures_.vcpu_us.at(end.id) += std::chrono::duration<double, std::micro>(end.time).count();
      auto& ticks = figures_.vcpu_ticks.at(end.id);
      if (ticks && end.ticks)
        ticks = TickFigures{ticks->user + end.ticks->user, ticks->system + end.ticks->system};
      else
        ticks.reset();
    }
    if (!power_->hyperv) return;
    const HypercallCounts counts = power_->hyperv->hypercalls().counts();
    figures_.calls.query_capabilities += counts.query_capabilities;
    figures_.calls.memory_heat_hint += counts.memory_heat_hint;
    add(figures_.heat, power_->hyperv->hypercalls().heat_counts());
    figures_.calls.get_boot_zeroed_memory += counts.get_boot_zeroed_memory;
    figures_.calls.other += counts.other;
  }

  /// Every vCPU has ended.
  std::expected<void, std::string> take_vcpus() {
    auto vcpus = group_->take_vcpus();
    if (!vcpus) return std::unexpected(vcpus.error().message());
    power_->vcpus = std::move(*vcpus);
    if (!trace_ || !power_->hyperv) return {};
    for (const Vcpu& vcpu : power_->vcpus)
      if (auto held = power_->hyperv->trace_held_msrs(vcpu); !held) return std::unexpected(held.error().message());
    return {};
  }

  std::expected<void, std::string> save() {
    const auto msrs = kvm_->msr_indices();
    if (!msrs) return std::unexpected(msrs.error().message());
    SavedMachine machine;
    machine.options = options_;
    const bool has_hyperv = power_->hyperv.has_value();
    machine.options.hypercalls = has_hyperv ? used_for(power_->hyperv->transport()) : Hypercalls::off;
    const bool has_kvms_msrs = has_hyperv && power_->hyperv->transport() != HypercallTransport::user;
    for (Vcpu& vcpu : power_->vcpus) {
      const auto handle = [&](const Exit& exit) {
        on_exit(vcpu, exit);
        return !findings_.failure();
      };
      if (auto finished = finish_exit(vcpu, handle); !finished) return finished;
    }
    // Before the vCPUs' TSCs, behind which the time that goes by one must be.
    if (has_hyperv) {
      const auto state = power_->hyperv->state(power_->vcpus.front());
      if (!state) return std::unexpected(state.error().message());
      machine.hyperv = *state;
    }
    if (auto board = save_board(*power_->vm, machine); !board) return board;
    for (Vcpu& vcpu : power_->vcpus) {
      auto saved = save_vcpu(vcpu, *msrs, kvm_->capabilities().nested_state_bytes != 0, has_kvms_msrs);
      if (!saved) return std::unexpected(std::move(saved.error()));
      machine.vcpus.push_back(std::move(*saved));
    }
    const auto clock = power_->vm->clock();
    if (!clock) return std::unexpected(clock.error().message());
    machine.clock = *clock;
    machine.devices = guest_->devices();
    return write_machine(options_.save, machine, *memory_);
  }

  /// What the VM and its vCPUs were, put into those that were made.
  Result<void> restore() {
    const SavedMachine& machine = *saved_;
    if (auto set = power_->vm->set_clock(machine.clock); !set) return failure(set.error().message());
    const auto done = [&]() -> std::expected<void, std::string> {
      for (std::size_t i = 0; i < power_->vcpus.size(); ++i)
        if (auto put = restore_vcpu(power_->vcpus[i], machine.vcpus[i]); !put) return put;
      if (power_->hyperv) {
        auto put = power_->hyperv->restore(power_->vcpus.front(), machine.hyperv);
        if (!put) return std::unexpected(put.error().message());
      }
      for (std::size_t i = 0; i < power_->vcpus.size(); ++i)
        if (auto put = restore_hyperv_msrs(power_->vcpus[i], machine.vcpus[i]); !put) return put;
      return restore_board(*power_->vm, machine);
    }();
    if (!done) return failure("--restore: " + done.error());
    if (auto put = guest_->restore_devices(machine.devices); !put) return put;
    saved_.reset();
    return {};
  }

  /// Off and on again, if the guest came to its end. Memory is as new but for what a guest starts with.
  Result<void> power_cycle() {
    if (auto ended = guest_->collect(*memory_->snapshot(), figures_); !ended) return ended;
    group_.reset();
    power_.reset();
    for (const auto map = memory_->snapshot(); const auto& region : map->regions())
      memory_->disarm_write_watch(region.start());
    if (auto discarded = memory_->reset(); !discarded) return failure("reset: " + discarded.error().message());
    ++figures_.resets;
    returned_.clear();
    if (auto prepared = prepare_ram(options_, *memory_->snapshot()); !prepared)
      return failure(std::move(prepared.error()));
    return power_on();
  }

  /// What a guest starts with, in memory that is all zero.
  Result<void> load() {
    for (const std::uint64_t page : spread_pages(guest_->ram(), options_.leftovers, guest_->lives_in())) {
      // Its last word, so that a look at a page's beginning would miss it.
      const GuestAddress at(page * page_size + page_size - sizeof page);
      if (auto written = memory_->write_value(at, page); !written) return failure(written.error().message());
      mark_as_loaded(page);
    }
    if (auto loaded = guest_->load(*memory_); !loaded) return loaded;
    return mark_what_was_loaded();
  }

  /// To vCPUs that can be started.
  Result<void> power_on() {
    if (!saved_)
      if (auto loaded = load(); !loaded) return loaded;
    power_ = std::make_unique<Powered>();
    auto vm = kvm_->create_vm();
    if (!vm) return failure("KVM makes no VM: " + vm.error().message());
    power_->vm = std::make_unique<Vm>(std::move(*vm));
    std::vector<MemorySlot> slots;
    for (const auto map = memory_->snapshot(); const auto& region : map->regions()) {
      slots.push_back({.slot = static_cast<std::uint32_t>(slots.size()),
                       .guest_address = region.start().value(),
                       .bytes = region.bytes(),
                       .host_address = region.host_address()});
      if (auto set = power_->vm->set_memory_slot(slots.back()); !set) return failure(set.error().message());
    }
    if (auto added = guest_->add_devices(*power_->vm); !added) return added;
    if (auto known = know_writes(slots); !known) return known;
    if (auto made = make_hyperv(); !made) return made;
    if (auto made = make_vcpus(); !made) return made;
    if (saved_) return restore();
    return {};
  }

  /// What holds data from the start is marked as this program's: no log is kept yet, and evidence does not tell who
  /// wrote.
  Result<void> mark_what_was_loaded() {
    const zeroing::Pages loaded = guest_->lives_in();
    std::array<std::uint64_t, page_size / sizeof(std::uint64_t)> words;
    for (std::uint64_t page = loaded.first; page < loaded.first + loaded.count; ++page) {
      const auto read = memory_->read(GuestAddress(page * page_size), std::as_writable_bytes(std::span(words)));
      if (!read) return failure(read.error().message());
      if (std::ranges::any_of(words, [](std::uint64_t word) { return word != 0; })) mark_as_loaded(page);
    }
    return {};
  }

  void mark_as_loaded(std::uint64_t page) {
    if (const auto pages = PageRange::make(PageNumber(page), 1)) memory_->mark_touched(*pages, Toucher::host);
  }

  /// From here on this program writes guest memory through the accessors alone.
  Result<void> know_writes(const std::vector<MemorySlot>& slots) {
    if (options_.write_watch)
      for (const auto map = memory_->snapshot(); const auto& region : map->regions())
        if (auto armed = memory_->arm_write_watch(region.start(), {.written_through_this_mapping_only = true}); !armed)
          return failure("--write-watch: " + armed.error().message());
    if (!options_.dirty_log) return {};
    // The stores of a vCPU that is in the guest may not be in KVM's log yet: only where the vCPU that asks is the only
    // one does it prove anything. With more it tells who wrote.
    auto log = DirtyLog::start(*power_->vm, *memory_, slots, {.complete = options_.cpus == 1});
    if (!log) return failure("--dirty-log: " + log.error().message());
    power_->dirty_log.emplace(std::move(*log));
    return {};
  }

  /// After a boot's first answer: what was kept up for its sake is so no longer.
  void end_preparations() {
    std::call_once(power_->preparations_ended, [this] {
      for (const auto map = memory_->snapshot(); const auto& region : map->regions())
        memory_->disarm_write_watch(region.start());
      if (power_->dirty_log)
        if (auto stopped = power_->dirty_log->stop(); !stopped)
          findings_.fail("--dirty-log: " + stopped.error().message());
      if (options_.huge_pages != HugePageUse::after_answer) return;
      if (auto set = memory_->snapshot()->set_huge_pages(HugePages::preferred); !set)
        findings_.fail("--thp after-answer: " + set.error().message());
    });
  }

  VcpuAction on_exit(Vcpu& vcpu, const Exit& exit) {
    const auto fail = [&](const std::string& text) {
      findings_.fail("vCPU " + std::to_string(vcpu.id()) + ": " + text);
      return VcpuAction::stop_group;
    };
    if (power_->hyperv) {
      const auto handled = power_->hyperv->handle(vcpu, exit);
      if (!handled) return fail(handled.error().message());
      if (*handled && trace_ && std::holds_alternative<Hypercall>(exit))
        if (auto held = trace_held_msrs(vcpu); !held) return fail(held.error());
      // An audit that failed has said so to the findings.
      if (*handled) return findings_.failure() ? VcpuAction::stop_group : VcpuAction::resume;
    }
    // SynIC is KVM's; that the guest has set it up is nothing to do here.
    if (std::holds_alternative<HypervEvent>(exit)) return VcpuAction::resume;
    if (const auto* const call = std::get_if<Hypercall>(&exit)) {
      // No other hypercall is answered here. KVM looks at these bits first, too.
      const HvControl control{call->control};
      const bool is_malformed = control.has_reserved_bits() || control.is_nested();
      const HvStatus status = is_malformed ? HvStatus::invalid_hypercall_input : HvStatus::invalid_hypercall_code;
      if (auto done = vcpu.complete_hypercall(hv_result(status)); !done) return fail(done.error().message());
      return VcpuAction::resume;
    }
    const auto action = guest_->on_exit(vcpu, exit);
    return action ? *action : fail(action.error());
  }

  /// At the vCPU's first call of a boot that has a result: it has set them up by then, and may take them back later.
  std::expected<void, std::string> trace_held_msrs(const Vcpu& vcpu) {
    auto due = MsrTrace::due;
    if (!power_->msr_traces[vcpu.id()].compare_exchange_strong(due, MsrTrace::done)) return {};
    if (auto held = power_->hyperv->trace_held_msrs(vcpu); !held) return std::unexpected(held.error().message());
    return {};
  }

  Result<void> make_hyperv() {
    if (options_.hypercalls == Hypercalls::off) return {};
    HvOptions hv;
    hv.boot_zeroed_memory = has_enlightenment(options_.enlightenments, "hv-boot-zeroed-mem");
    if (has_enlightenment(options_.enlightenments, "hv-memory-hint")) {
      // Others may take huge pages that the guest gives back.
      if (!fault_guard_) {
        auto installed = FaultGuard::install();
        if (!installed) return failure(installed.error().message());
        fault_guard_.emplace(std::move(*installed));
      }
      hv.memory_heat.policy = standard_heat_policy(*memory_);
    }
    if (!options_.map.empty())
      hv.memory_heat.on_hint = [this](const HeatHinted& hinted) {
        if (hinted.done.freed_pages != 0) returned_.add(hinted.pages);
      };
    hv.extended_hypercalls = hv.boot_zeroed_memory || hv.memory_heat.policy ||
                             has_enlightenment(options_.enlightenments, "hv-ext-query-caps");
    hv.on_boot_zeroed = [this](const BootZeroedAnswer& answer) {
      const std::lock_guard lock(answering_);
      if (memory_log_) memory_log_->add_answer();
      on_answer(answer, figures_.resets + 1, options_, *memory_->snapshot(), returned_, findings_, stop_.get_token());
      end_preparations();
    };
    if (trace_)
      hv.trace = [this](const HvTraceEvent& event) {
        trace_->add(event);
        auto none = MsrTrace::none;
        if (const auto* const call = std::get_if<HvCallEnded>(&event); call != nullptr && call->result)
          power_->msr_traces[call->call.vp_index].compare_exchange_strong(none, MsrTrace::due);
      };
    if (options_.content_check)
      hv.survey.content_check =
          ContentCheckOptions{.executor = [this](auto task) { boost::asio::post(helpers_, std::move(task)); }};
    std::optional<HypercallTransport> transport;
    if (options_.hypercalls == Hypercalls::kernel) transport = HypercallTransport::kernel;
    if (options_.hypercalls == Hypercalls::split) transport = HypercallTransport::split;
    if (options_.hypercalls == Hypercalls::user) transport = HypercallTransport::user;
    auto hyperv = Hyperv::create(*power_->vm, *memory_, std::move(hv), transport);
    if (!hyperv)
      return failure(std::string("--hypercalls ") + to_string(options_.hypercalls) + ": " + hyperv.error().message());
    power_->hyperv.emplace(std::move(*hyperv));
    if (trace_) trace_->begin_boot(figures_.resets + 1, used_for(power_->hyperv->transport()));
    return {};
  }

  /// Of Hyper-V what the guest is to see, as far as KVM has it.
  Result<HypervCpuid> show_hyperv(Vcpu& vcpu) {
    const Enlightenments& chosen = options_.enlightenments;
    const auto lacks = [&](const EnlightenmentBits& supported) -> std::string {
      if (chosen.set != EnlightenmentSet::listed) return {};
      const std::string missing = first_missing(chosen, supported);
      return missing.empty() ? missing : "--enlightenments: there is no " + missing + " for this guest here";
    };
    if (chosen.set == EnlightenmentSet::minimal) return HypervCpuid{.with_time = false};
    if (power_->hyperv->transport() == HypercallTransport::user) {
      if (chosen.set == EnlightenmentSet::full) return HypervCpuid{};
      auto leaves = user_leaves(vcpu, power_->hyperv->hypercalls().options());
      if (const std::string why = lacks(bits_in(leaves)); !why.empty()) return failure(why);
      keep_only(leaves, bits_of(chosen));
      return HypervCpuid{.leaves = std::move(leaves)};
    }
    const bool wants_synic = has_enlightenment(chosen, "hv-synic") || has_enlightenment(chosen, "hv-stimer");
    if (wants_synic && guest_->has_interrupt_controller() && kvm_->capabilities().hyperv_synic)
      if (auto enabled = vcpu.enable_hyperv_synic(); !enabled) return failure(enabled.error().message());
    auto full = full_hv_cpuid(vcpu);
    if (!full) return failure(full.error().message());
    const bool is_listed = chosen.set == EnlightenmentSet::listed;
    if (const std::string why = lacks(bits_in(*full)); !why.empty()) return failure(why);
    if (is_listed) keep_only(*full, bits_of(chosen));
    leave_out_unhandled(*full);
    return HypervCpuid{.leaves = std::move(*full), .enforce = is_listed && kvm_->capabilities().hyperv_enforce_cpuid};
  }

  /// Of a guest that was saved elsewhere; not all processors can have another one than their own.
  static Result<void> set_tsc_frequency(Vcpu& vcpu, std::uint32_t khz) {
    if (const auto own = vcpu.tsc_khz(); own && *own == khz) return {};
    if (auto set = vcpu.set_tsc_khz(khz); !set) return failure("--restore: " + set.error().message());
    return {};
  }

  Result<void> make_vcpus() {
    for (std::uint32_t id = 0; id < options_.cpus; ++id) {
      auto vcpu = power_->vm->create_vcpu(id);
      if (!vcpu) return failure("vCPU " + std::to_string(id) + ": " + vcpu.error().message());
      if (saved_)
        if (auto set = set_tsc_frequency(*vcpu, saved_->vcpus[id].tsc_khz); !set) return set;
      auto leaves = guest_->cpuid(cpuid_, id);
      if (power_->hyperv) {
        auto shown = show_hyperv(*vcpu);
        if (!shown) return std::unexpected(std::move(shown.error()));
        if (auto prepared = power_->hyperv->prepare(*vcpu, std::move(leaves), *shown); !prepared)
          return failure(prepared.error().message());
      } else if (auto set = vcpu->set_cpuid(leaves); !set) {
        return failure(set.error().message());
      }
      if (!saved_)
        if (auto set = guest_->set_registers(*vcpu); !set) return set;
      power_->vcpus.push_back(std::move(*vcpu));
    }
    return {};
  }

  static Result<std::uint64_t> resident_bytes(const MemoryMap& map) {
    std::uint64_t sum = 0;
    for (const auto& region : map.regions()) {
      const auto bytes = region.resident_bytes();
      if (!bytes) return failure(bytes.error().message());
      sum += *bytes;
    }
    return sum;
  }

  /// What the host's memory at its peak is told from.
  Result<void> note_start() {
    if (options_.backing == MemoryBacking::hugetlb || options_.backing == MemoryBacking::hugetlb_memfd) return {};
    const auto resident = resident_bytes(*memory_->snapshot());
    if (!resident) return std::unexpected(resident.error());
    resident_at_start_ = *resident;
    peak_ = HostPeak::begin();
    return {};
  }

  Result<RunFigures> collect() {
    if (power_->hyperv) figures_.transport = used_for(power_->hyperv->transport());
    figures_.answers = findings_.answers();
    figures_.ticks_per_second = vcpu_ticks_per_second();
    const auto map = memory_->snapshot();
    figures_.ram_pages = map->pages(RegionKind::ram).page_count();
    if (auto collected = guest_->collect(*map, figures_); !collected)
      return std::unexpected(std::move(collected.error()));
    const auto resident = resident_bytes(*map);
    if (!resident) return std::unexpected(resident.error());
    figures_.host_resident_bytes = *resident;
    if (auto& peak = figures_.host_peak_bytes) peak = std::max(*peak + resident_at_start_, *resident);
    utsname name{};
    if (uname(&name) == 0) figures_.kernel_release = name.release;
    return std::move(figures_);
  }

  Options options_;
  std::optional<Kvm> kvm_;
  std::vector<CpuidEntry> cpuid_;
  std::unique_ptr<Guest> guest_;
  std::vector<std::shared_ptr<OwnMapping>> mappings_;
  std::unique_ptr<GuestMemory> memory_;
  Findings findings_;
  std::optional<FaultGuard> fault_guard_;
  ReturnedPages returned_; ///< Of this boot.
  std::mutex answering_;   // one audit at a time
  std::unique_ptr<TraceFile> trace_;
  std::unique_ptr<HostMemoryLog> memory_log_;
  std::optional<SavedMachine> saved_; ///< Until it is restored.
  std::stop_source stop_;
  std::optional<HostPeak> peak_;
  std::uint64_t resident_at_start_ = 0; ///< Of guest memory.
  RunFigures figures_;                  ///< Of all boots so far; what the vCPUs find out comes last.
  boost::asio::io_context io_;
  boost::asio::signal_set signals_{io_};
  int signal_ = 0; ///< That ends the run.
  bool restarting_ = false;
  std::unique_ptr<Powered> power_;
  std::optional<VcpuGroup> group_;
  boost::asio::thread_pool helpers_{std::max(std::thread::hardware_concurrency(), 1U)};
};

} // namespace

std::expected<RunFigures, Failure> run_guest(const Options& options) {
  Machine machine(options);
  if (auto built = machine.build(); !built) return std::unexpected(std::move(built.error()));
  return machine.run();
}

} // namespace cppvmm::boot

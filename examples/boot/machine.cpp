#include "machine.hpp"

#include "layout.hpp"

#include <algorithm>
#include <array>
#include <boost/asio/io_context.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/signal_set.hpp>
#include <boost/asio/thread_pool.hpp>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <optional>
#include <ratio>
#include <stop_token>
#include <sys/utsname.h>
#include <thread>
#include <utility>
#include <vector>

#include "answer_figures.hpp"
#include "guest.hpp"
#include "linux_guest.hpp"
#include "ram.hpp"
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
  void answered(AnswerFigures answer) {
    const std::scoped_lock lock(mutex_);
    answer_ = std::move(answer);
  }
  [[nodiscard]] std::optional<std::string> failure() const {
    const std::scoped_lock lock(mutex_);
    return failure_;
  }
  [[nodiscard]] std::optional<AnswerFigures> answer() const {
    const std::scoped_lock lock(mutex_);
    return answer_;
  }

private:
  mutable std::mutex mutex_;
  std::optional<std::string> failure_;
  std::optional<AnswerFigures> answer_;
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

/// Called on a vCPU's thread between the answer and the guest's next instruction. The audit has a thread of its own,
/// so that the vCPU's ticks are those of an answer without it.
void on_answer(const BootZeroedAnswer& answer, const Options& options, const MemoryMap& map, Findings& findings,
               const std::stop_token& stop) noexcept {
  try {
    AnswerFigures figures = describe(answer);
    if (!options.map.empty()) figures.picture = picture_of(answer.survey);
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
    findings.answered(std::move(figures));
  } catch (const std::exception& error) {
    findings.fail(std::string("audit: ") + error.what());
  }
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

class Machine {
public:
  explicit Machine(const Options& options) : options_(options) {}

  Result<void> build() {
    auto kvm = Kvm::open(options_.kvm_device.c_str());
    if (!kvm) return failure(explain_open(options_.kvm_device, kvm.error()));
    auto guest = options_.kernel.empty() ? make_zeroing_guest(options_) : make_linux_guest(options_);
    if (!guest) return std::unexpected(std::move(guest.error()));
    guest_ = std::move(*guest);
    auto cpuid = kvm->supported_cpuid();
    if (!cpuid) return failure(cpuid.error().message());
    if (auto fits = check_address_bits(*cpuid, guest_->ram()); !fits) return fits;
    if (options_.cpus > kvm->capabilities().max_vcpus)
      return failure("--cpus is too many: KVM gives a VM at most " + std::to_string(kvm->capabilities().max_vcpus));

    auto ram = make_ram(options_, guest_->ram());
    if (!ram) return failure(std::move(ram.error()));
    mappings_ = std::move(ram->mappings);
    memory_ = std::make_unique<GuestMemory>(std::move(ram->map));
    for (const std::uint64_t page : spread_pages(guest_->ram(), options_.leftovers, guest_->lives_in())) {
      // Its last word, so that a look at a page's beginning would miss it.
      const GuestAddress at(page * page_size + page_size - sizeof page);
      if (auto written = memory_->write_value(at, page); !written) return failure(written.error().message());
      mark_as_loaded(page);
    }
    if (auto loaded = guest_->load(*memory_); !loaded) return loaded;
    if (auto marked = mark_what_was_loaded(); !marked) return marked;

    auto vm = kvm->create_vm();
    if (!vm) return failure("KVM makes no VM: " + vm.error().message());
    vm_ = std::make_unique<Vm>(std::move(*vm));
    std::vector<MemorySlot> slots;
    for (const auto map = memory_->snapshot(); const auto& region : map->regions()) {
      slots.push_back({.slot = static_cast<std::uint32_t>(slots.size()),
                       .guest_address = region.start().value(),
                       .bytes = region.bytes(),
                       .host_address = region.host_address()});
      if (auto set = vm_->set_memory_slot(slots.back()); !set) return failure(set.error().message());
    }
    if (auto added = guest_->add_devices(*vm_); !added) return added;
    if (auto known = know_writes(slots); !known) return known;
    if (auto made = make_hyperv(); !made) return made;
    return make_vcpus(*cpuid);
  }

  Result<RunFigures> run() {
    boost::asio::io_context io;
    boost::asio::signal_set signals(io, SIGINT, SIGTERM);
    std::optional<VcpuEnds> ends;
    int signal = 0;

    guest_->begin(io);
    const auto started = Clock::now();
    auto group = VcpuGroup::start(
        std::move(vcpus_), [this](Vcpu& vcpu, const Exit& exit) { return on_exit(vcpu, exit); }, io.get_executor());
    if (!group) {
      guest_->end();
      return failure("no vCPU threads: " + group.error().message());
    }
    group->async_wait([&](VcpuEnds ended) {
      ends = std::move(ended);
      signals.cancel();
      signals.clear(); // what is left to do may simply be killed
      guest_->end();
    });
    signals.async_wait([&](const boost::system::error_code& error, int number) {
      if (error) return;
      signal = number;
      signals.clear(); // a second one kills
      stop_.request_stop();
      group->stop();
    });
    io.run();
    const auto wall = Clock::now() - started;
    guest_->end();

    if (signal != 0)
      return std::unexpected(Failure{.status = 128 + signal, .text = "interrupted, no figures were written"});
    if (!ends) return failure("the vCPU threads did not end");
    return collect(*ends, wall);
  }

private:
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
    auto log = DirtyLog::start(*vm_, *memory_, slots, {.complete = options_.cpus == 1});
    if (!log) return failure("--dirty-log: " + log.error().message());
    dirty_log_.emplace(std::move(*log));
    return {};
  }

  /// After the first answer: what was kept up for its sake is so no longer.
  void end_preparations() {
    std::call_once(preparations_ended_, [this] {
      for (const auto map = memory_->snapshot(); const auto& region : map->regions())
        memory_->disarm_write_watch(region.start());
      if (dirty_log_)
        if (auto stopped = dirty_log_->stop(); !stopped) findings_.fail("--dirty-log: " + stopped.error().message());
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
    if (hyperv_) {
      const auto handled = hyperv_->handle(vcpu, exit);
      if (!handled) return fail(handled.error().message());
      // An audit that failed has said so to the findings.
      if (*handled) return findings_.failure() ? VcpuAction::stop_group : VcpuAction::resume;
    }
    const auto action = guest_->on_exit(vcpu, exit);
    return action ? *action : fail(action.error());
  }

  Result<void> make_hyperv() {
    if (options_.hypercalls == Hypercalls::off) return {};
    HvOptions hv;
    hv.on_boot_zeroed = [this](const BootZeroedAnswer& answer) {
      on_answer(answer, options_, *memory_->snapshot(), findings_, stop_.get_token());
      end_preparations();
    };
    if (options_.content_check)
      hv.survey.content_check =
          ContentCheckOptions{.executor = [this](auto task) { boost::asio::post(helpers_, std::move(task)); }};
    std::optional<HypercallTransport> transport;
    if (options_.hypercalls == Hypercalls::kernel) transport = HypercallTransport::kernel;
    if (options_.hypercalls == Hypercalls::user) transport = HypercallTransport::user;
    auto hyperv = Hyperv::create(*vm_, *memory_, std::move(hv), transport);
    if (!hyperv)
      return failure(std::string("--hypercalls ") + to_string(options_.hypercalls) + ": " + hyperv.error().message());
    hyperv_.emplace(std::move(*hyperv));
    return {};
  }

  Result<void> make_vcpus(const std::vector<CpuidEntry>& cpuid) {
    for (std::uint32_t id = 0; id < options_.cpus; ++id) {
      auto vcpu = vm_->create_vcpu(id);
      if (!vcpu) return failure("vCPU " + std::to_string(id) + ": " + vcpu.error().message());
      auto leaves = guest_->cpuid(cpuid, id);
      if (hyperv_) {
        if (auto prepared = hyperv_->prepare(*vcpu, std::move(leaves)); !prepared)
          return failure(prepared.error().message());
      } else if (auto set = vcpu->set_cpuid(leaves); !set) {
        return failure(set.error().message());
      }
      if (auto set = guest_->set_registers(*vcpu); !set) return set;
      vcpus_.push_back(std::move(*vcpu));
    }
    return {};
  }

  Result<RunFigures> collect(const VcpuEnds& ends, Clock::duration wall) const {
    for (const auto& end : ends) {
      if (end.error) findings_.fail("vCPU " + std::to_string(end.id) + ": " + end.error->message());
      if (end.exception == nullptr) continue;
      try {
        std::rethrow_exception(end.exception);
      } catch (const std::exception& error) {
        findings_.fail("vCPU " + std::to_string(end.id) + ": " + error.what());
      }
    }
    if (auto text = findings_.failure()) return failure(std::move(*text));

    RunFigures figures;
    figures.options = options_;
    figures.wall_ms = Milliseconds(wall).count();
    if (hyperv_) {
      figures.transport = hyperv_->transport() == HypercallTransport::kernel ? Hypercalls::kernel : Hypercalls::user;
      const HypercallCounts counts = hyperv_->hypercalls().counts();
      figures.calls = {counts.query_capabilities, counts.get_boot_zeroed_memory, counts.other};
    }
    figures.answer = findings_.answer();
    figures.ticks_per_second = vcpu_ticks_per_second();
    for (const auto& end : ends)
      figures.vcpu_ticks.push_back(end.ticks ? std::optional(TickFigures{end.ticks->user, end.ticks->system})
                                             : std::nullopt);

    const auto map = memory_->snapshot();
    figures.ram_pages = map->pages(RegionKind::ram).page_count();
    if (auto collected = guest_->collect(*map, figures); !collected)
      return std::unexpected(std::move(collected.error()));
    for (const auto& region : map->regions()) {
      const auto bytes = region.resident_bytes();
      if (!bytes) return failure(bytes.error().message());
      figures.host_resident_bytes += *bytes;
    }
    utsname name{};
    if (uname(&name) == 0) figures.kernel_release = name.release;
    return figures;
  }

  Options options_;
  std::unique_ptr<Guest> guest_;
  std::vector<std::shared_ptr<OwnMapping>> mappings_;
  std::unique_ptr<GuestMemory> memory_;
  std::unique_ptr<Vm> vm_;
  std::optional<DirtyLog> dirty_log_;
  std::once_flag preparations_ended_;
  boost::asio::thread_pool helpers_{std::max(std::thread::hardware_concurrency(), 1U)};
  std::optional<Hyperv> hyperv_;
  std::vector<Vcpu> vcpus_;
  mutable Findings findings_;
  std::stop_source stop_;
};

} // namespace

std::expected<RunFigures, Failure> run_guest(const Options& options) {
  Machine machine(options);
  if (auto built = machine.build(); !built) return std::unexpected(std::move(built.error()));
  return machine.run();
}

} // namespace cppvmm::boot

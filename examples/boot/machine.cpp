#include "machine.hpp"

#include "layout.hpp"

#include <algorithm>
#include <array>
#include <boost/asio/io_context.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/signal_set.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/thread_pool.hpp>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <optional>
#include <ratio>
#include <stop_token>
#include <sys/utsname.h>
#include <system_error>
#include <thread>
#include <unistd.h>
#include <utility>
#include <variant>
#include <vector>

#include "ram.hpp"

import cppvmm.hv_ext;
import cppvmm.vcpu;
import cppvmm.vcpu_group;

namespace cppvmm::boot {
namespace {

using Clock = std::chrono::steady_clock;
using Milliseconds = std::chrono::duration<double, std::milli>;
using Microseconds = std::chrono::duration<double, std::micro>;
template <class T>
using Result = std::expected<T, Failure>;

std::unexpected<Failure> failure(std::string text) {
  return std::unexpected(Failure{.status = 1, .text = std::move(text)});
}

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
  void guest_exited(std::uint32_t code) {
    const std::scoped_lock lock(mutex_);
    exit_code_ = code;
  }
  void answered(AnswerFigures answer) {
    const std::scoped_lock lock(mutex_);
    answer_ = std::move(answer);
  }
  [[nodiscard]] std::optional<std::string> failure() const {
    const std::scoped_lock lock(mutex_);
    return failure_;
  }
  [[nodiscard]] std::optional<std::uint32_t> exit_code() const {
    const std::scoped_lock lock(mutex_);
    return exit_code_;
  }
  [[nodiscard]] std::optional<AnswerFigures> answer() const {
    const std::scoped_lock lock(mutex_);
    return answer_;
  }

private:
  mutable std::mutex mutex_;
  std::optional<std::string> failure_;
  std::optional<std::uint32_t> exit_code_;
  std::optional<AnswerFigures> answer_;
};

std::optional<std::string> describe(const std::optional<MemoryError>& error) {
  return error ? std::optional(error->message()) : std::nullopt;
}

std::optional<WatchFigures> describe(const std::optional<WatchReport>& watch) {
  if (!watch) return std::nullopt;
  return WatchFigures{.written_pages = watch->written_pages,
                      .zero_pages = watch->zero_pages,
                      .us = Microseconds(watch->cost).count(),
                      .error = describe(watch->error)};
}

std::optional<ContentFigures> describe(const std::optional<ContentCheckReport>& content) {
  if (!content) return std::nullopt;
  return ContentFigures{.checked_pages = content->checked_pages,
                        .zero_pages = content->zero_pages,
                        .absent_pages = content->absent_pages,
                        .unchecked_pages = content->unchecked_pages,
                        .us = Microseconds(content->cost).count(),
                        .error = describe(content->error)};
}

AnswerFigures describe(const BootZeroedAnswer& answer) {
  AnswerFigures figures;
  PageSet reported;
  for (const auto& range : answer.ranges) {
    figures.ranges.push_back({range.first().value(), range.count()});
    reported.add(range);
  }
  reported.intersect(answer.survey.ram);
  figures.reported_pages = reported.page_count();
  figures.touched_pages = answer.survey.touched.page_count();
  figures.survey_us = Microseconds(answer.survey.cost).count();
  for (const auto& region : answer.survey.regions)
    figures.regions.push_back({.first_page = region.pages.first().value(),
                               .page_count = region.pages.count(),
                               .kind = region.kind == RegionKind::ram ? "ram" : "rom",
                               .backing = to_string(region.backing),
                               .evidence = to_string(region.evidence),
                               .watch = describe(region.watch),
                               .log = describe(region.log),
                               .content = describe(region.content),
                               .touched_pages = region.touched_pages,
                               .zeroed_pages = region.zeroed_pages,
                               .given_up_pages = region.given_up_pages,
                               .unaccounted_pages = region.unaccounted_pages,
                               .survey_us = Microseconds(region.cost).count(),
                               .error = describe(region.error)});
  return figures;
}

PageClass class_of(Touchers by) {
  constexpr std::array<std::pair<Toucher, PageClass>, 3> known = {
      {{Toucher::host, PageClass::host}, {Toucher::guest, PageClass::guest}, {Toucher::device, PageClass::device}}};
  auto what = PageClass::unknown;
  for (const auto& [toucher, drawn] : known)
    if (by.has(toucher)) what = what == PageClass::unknown ? drawn : PageClass::several;
  return what;
}

/// All RAM, by what the survey knows of it.
std::vector<PictureRange> picture_of(const Survey& survey) {
  std::vector<PictureRange> result;
  const auto add = [&](const PageSet& pages, PageClass what) {
    for (const auto& range : pages.ranges())
      result.push_back({range.first().value(), range.count(), what});
  };
  add(survey.zeroed, PageClass::zeroed);
  PageSet left_out = survey.ram;
  left_out.remove(survey.zeroed);
  left_out.remove(survey.touched);
  add(left_out, PageClass::left_out);
  for (const auto& entry : survey.touched_map().entries()) {
    // Marks may be on pages that are no RAM.
    PageSet pages = entry.pages;
    if (!survey.touched.contains(entry.pages)) pages.intersect(survey.touched);
    add(pages, class_of(entry.by));
  }
  std::ranges::sort(result, {}, &PictureRange::first);
  return result;
}

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

std::string describe_exit(const Exit& exit) {
  std::string text = exit_name(exit);
  const auto number = [](std::uint64_t value) {
    char digits[24];
    std::snprintf(digits, sizeof digits, "0x%llx", static_cast<unsigned long long>(value));
    return std::string(digits);
  };
  if (const auto* unknown = std::get_if<UnknownExit>(&exit))
    text += " (reason " + std::to_string(unknown->reason) + ", hardware " + number(unknown->hardware_reason) + ")";
  else if (const auto* read_msr = std::get_if<ReadMsr>(&exit))
    text += " (MSR " + number(read_msr->index) + ")";
  else if (const auto* write_msr = std::get_if<WriteMsr>(&exit))
    text += " (MSR " + number(write_msr->index) + ")";
  else if (const auto* in = std::get_if<IoIn>(&exit))
    text += " (port " + number(in->port) + ")";
  else if (const auto* out = std::get_if<IoOut>(&exit))
    text += " (port " + number(out->port) + ")";
  else if (const auto* read = std::get_if<MmioRead>(&exit))
    text += " (address " + number(read->address) + ")";
  else if (const auto* write = std::get_if<MmioWrite>(&exit))
    text += " (address " + number(write->address) + ")";
  else if (const auto* entry = std::get_if<FailEntry>(&exit))
    text += " (hardware reason " + number(entry->hardware_reason) + ")";
  else if (const auto* internal = std::get_if<InternalError>(&exit))
    text += " (suberror " + std::to_string(internal->suberror) + ")";
  else if (const auto* event = std::get_if<SystemEvent>(&exit))
    text += " (type " + std::to_string(event->type) + ")";
  else if (const auto* fault = std::get_if<MemoryFault>(&exit))
    text += " (address " + number(fault->address) + ", " + std::generic_category().message(fault->os_error) + ")";
  return text;
}

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

VcpuAction on_exit(Vcpu& vcpu, const Exit& exit, Hyperv* hyperv, Gate& gate, Findings& findings) {
  const auto fail = [&](const std::string& text) {
    findings.fail("vCPU " + std::to_string(vcpu.id()) + ": " + text);
    return VcpuAction::stop_group;
  };
  if (hyperv != nullptr) {
    const auto handled = hyperv->handle(vcpu, exit);
    if (!handled) return fail(handled.error().message());
    // An audit that failed has said so to the findings.
    if (*handled) return findings.failure() ? VcpuAction::stop_group : VcpuAction::resume;
  }
  if (const auto action = written_to(zeroing::gate_port, exit)) {
    if (*action == static_cast<std::uint32_t>(zeroing::GateAction::open))
      gate.open();
    else
      gate.wait();
    return VcpuAction::resume;
  }
  if (const auto code = written_to(zeroing::exit_port, exit)) {
    findings.guest_exited(*code);
    return VcpuAction::stop_group;
  }
  if (std::holds_alternative<Hlt>(exit)) return VcpuAction::end_vcpu;
  if (std::holds_alternative<Shutdown>(exit)) return fail("the guest crashed (triple fault)");
  return fail("an exit that this guest has no reason for: " + describe_exit(exit));
}

Result<void> set_registers(Vcpu& vcpu, const Layout& layout) {
  constexpr std::uint16_t code_selector = 0x08;
  constexpr std::uint16_t data_selector = 0x10;
  auto special = vcpu.special_registers();
  if (!special) return failure(special.error().message());
  special->cs = code64_segment(code_selector);
  special->ds = special->es = special->fs = special->gs = special->ss = data_segment(data_selector);
  special->cr0 = cr0_pe | cr0_mp | cr0_et | cr0_ne | cr0_wp | cr0_pg;
  special->cr3 = layout.page_tables;
  special->cr4 = cr4_pae;
  special->efer = efer_lme | efer_lma;
  if (auto set = vcpu.set_special_registers(*special); !set) return failure(set.error().message());

  Registers registers;
  registers.rip = zeroing::image_address;
  registers.rdi = layout.boot_info;
  registers.rsi = vcpu.id();
  registers.rsp = layout.stack_top(vcpu.id());
  if (auto set = vcpu.set_registers(registers); !set) return failure(set.error().message());
  return {};
}

/// Whether a guest here can have addresses up to `end`.
Result<void> check_address_bits(std::span<const CpuidEntry> cpuid, std::uint64_t end) {
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
    auto layout = make_layout(options_.memory_bytes, options_.cpus, zeroing_guest_image());
    if (!layout) return failure(std::move(layout.error()));
    layout_ = std::move(*layout);
    auto cpuid = kvm->supported_cpuid();
    if (!cpuid) return failure(cpuid.error().message());
    if (auto fits = check_address_bits(*cpuid, layout_.end); !fits) return fits;
    if (options_.cpus > kvm->capabilities().max_vcpus)
      return failure("--cpus is too many: KVM gives a VM at most " + std::to_string(kvm->capabilities().max_vcpus));

    auto ram = make_ram(options_, layout_);
    if (!ram) return failure(std::move(ram.error()));
    mappings_ = std::move(ram->mappings);
    memory_ = std::make_unique<GuestMemory>(std::move(ram->map));
    if (auto loaded = load_guest(); !loaded) return loaded;

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
    if (auto known = know_writes(std::move(slots)); !known) return known;
    if (auto made = make_hyperv(); !made) return made;
    return make_vcpus(*cpuid);
  }

  Result<RunFigures> run() {
    boost::asio::io_context io;
    boost::asio::signal_set signals(io, SIGINT, SIGTERM);
    boost::asio::steady_timer timer(io);
    std::optional<VcpuEnds> ends;
    int signal = 0;

    const auto started = Clock::now();
    auto group = VcpuGroup::start(
        std::move(vcpus_),
        [this](Vcpu& vcpu, const Exit& exit) {
          return on_exit(vcpu, exit, hyperv_ ? &*hyperv_ : nullptr, gate_, findings_);
        },
        io.get_executor());
    if (!group) return failure("no vCPU threads: " + group.error().message());
    group->async_wait([&](VcpuEnds ended) {
      ends = std::move(ended);
      signals.cancel();
      signals.clear(); // what is left to do may simply be killed
      timer.cancel();
    });
    signals.async_wait([&](const boost::system::error_code& error, int number) {
      if (error) return;
      signal = number;
      signals.clear(); // a second one kills
      stop_.request_stop();
      group->stop();
    });
    show_progress(timer);
    io.run();
    const auto wall = Clock::now() - started;
    clear_progress();

    if (signal != 0)
      return std::unexpected(Failure{.status = 128 + signal, .text = "interrupted, no figures were written"});
    if (!ends) return failure("the vCPU threads did not end");
    return collect(*ends, wall);
  }

private:
  /// What holds data from the start is marked as this program's: no log is kept yet, and evidence does not tell who
  /// wrote.
  Result<void> load_guest() {
    if (auto loaded = memory_->load(GuestAddress(zeroing::image_address), layout_.block); !loaded)
      return failure(loaded.error().message());
    const std::uint64_t first = layout_.lives_in().first;
    for (std::uint64_t page = 0; page < layout_.lives_in().count; ++page)
      if (std::ranges::any_of(std::span(layout_.block).subspan(page * page_size, page_size),
                              [](std::byte byte) { return byte != std::byte{}; }))
        mark_as_loaded(first + page);
    for (const std::uint64_t page : spread_pages(layout_, options_.leftovers)) {
      // Its last word, so that a look at a page's beginning would miss it.
      const GuestAddress at(page * page_size + page_size - sizeof page);
      if (auto written = memory_->write_value(at, page); !written) return failure(written.error().message());
      mark_as_loaded(page);
    }
    return {};
  }

  void mark_as_loaded(std::uint64_t page) {
    if (const auto pages = PageRange::make(PageNumber(page), 1)) memory_->mark_touched(*pages, Toucher::host);
  }

  /// From here on this program writes guest memory through the accessors alone.
  Result<void> know_writes(std::vector<MemorySlot> slots) {
    if (options_.write_watch)
      for (const auto map = memory_->snapshot(); const auto& region : map->regions())
        if (auto armed = memory_->arm_write_watch(region.start(), {.written_through_this_mapping_only = true}); !armed)
          return failure("--write-watch: " + armed.error().message());
    if (!options_.dirty_log) return {};
    auto log = DirtyLog::start(*vm_, *memory_, std::move(slots), {.complete = true});
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
      if (hyperv_) {
        if (auto prepared = hyperv_->prepare(*vcpu, cpuid); !prepared) return failure(prepared.error().message());
      } else if (auto set = vcpu->set_cpuid(cpuid); !set) {
        return failure(set.error().message());
      }
      if (auto set = set_registers(*vcpu, layout_); !set) return set;
      vcpus_.push_back(std::move(*vcpu));
    }
    return {};
  }

  [[nodiscard]] std::uint64_t report_word(std::size_t offset) const {
    return memory_->read_value<std::uint64_t>(GuestAddress(layout_.report + offset)).value_or(0);
  }

  /// Four times a second on a terminal; else a line every ten seconds, which a short run never sees.
  void show_progress(boost::asio::steady_timer& timer) {
    timer.expires_after(terminal_ ? std::chrono::milliseconds(250) : std::chrono::seconds(10));
    timer.async_wait([this, &timer](const boost::system::error_code& error) {
      if (error) return;
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
      show_progress(timer);
    });
  }

  void clear_progress() const {
    if (terminal_ && progress_shown_) std::fprintf(stderr, "\r\033[K");
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
    const auto code = findings_.exit_code();
    if (!code) return failure("the guest halted before it was done");
    if (*code != static_cast<std::uint32_t>(zeroing::ExitCode::done))
      return failure("the guest gave up with exit code " + std::to_string(*code));

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
    if (auto read = map->read(GuestAddress(layout_.report), std::as_writable_bytes(std::span(&figures.guest, 1)));
        !read)
      return failure(read.error().message());
    for (const auto& region : map->regions()) {
      const auto bytes = region.resident_bytes();
      if (!bytes) return failure(bytes.error().message());
      figures.host_resident_bytes += *bytes;
    }
    if (options_.audit) {
      auto nonzero = nonzero_outside_the_guest(*map);
      if (!nonzero) return failure(std::move(nonzero.error()));
      figures.nonzero_pages_at_end = *nonzero;
    }
    utsname name{};
    if (uname(&name) == 0) figures.kernel_release = name.release;
    return figures;
  }

  Options options_;
  Layout layout_;
  std::vector<std::shared_ptr<OwnMapping>> mappings_;
  std::unique_ptr<GuestMemory> memory_;
  std::unique_ptr<Vm> vm_;
  std::optional<DirtyLog> dirty_log_;
  std::once_flag preparations_ended_;
  boost::asio::thread_pool helpers_{std::max(std::thread::hardware_concurrency(), 1U)};
  std::optional<Hyperv> hyperv_;
  std::vector<Vcpu> vcpus_;
  Gate gate_;
  mutable Findings findings_;
  std::stop_source stop_;
  bool terminal_ = isatty(STDERR_FILENO) == 1;
  bool progress_shown_ = false;
};

} // namespace

std::expected<RunFigures, Failure> run_zeroing_guest(const Options& options) {
  Machine machine(options);
  if (auto built = machine.build(); !built) return std::unexpected(std::move(built.error()));
  return machine.run();
}

} // namespace cppvmm::boot

#include "case.hpp"
#include "guest.hpp"
#include "helper.hpp"
#include "support/machine_facts.hpp"

#include <algorithm>
#include <array>
#include <cerrno>
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <expected>
#include <fcntl.h>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <thread>
#include <unistd.h>
#include <utility>
#include <vector>

#include "guest_log.hpp"
#include "oracle.hpp"

import cppvmm.guest_memory;
import cppvmm.hv_ext;

namespace cppvmm::oracle {
namespace {

// include/uapi/asm-generic/mman-common.h, which the C library's headers may lack: Linux 5.4, 5.14 and 6.1.
constexpr int madv_cold = 20;
constexpr int madv_pageout = 21;
constexpr int madv_populate_read = 22;
constexpr int madv_populate_write = 23;
constexpr int madv_collapse = 25;

constexpr std::uint32_t huge_pages = 512;
constexpr std::uint32_t most_populated = 600; // pages of a region: populating costs memory and tells little
constexpr std::size_t most_problems = 8;

/// Where in a page writers of data put their byte, and where writers of a single zero do.
constexpr std::array<std::uint32_t, 4> data_at = {0, 4095, 2056, 8};
constexpr std::uint32_t zero_at = 100;

/// TLFS "HvExtCallGetBootZeroedMemory", by own numbers.
constexpr std::uint64_t call_boot_zeroed = 0x8002;
constexpr std::size_t answer_bytes = 0xFF8;
constexpr std::size_t answer_ranges = 255;

std::vector<Span> spans(const PageSet& set) {
  std::vector<Span> result;
  for (const PageRange& range : set.ranges())
    result.push_back({range.first().value(), range.count()});
  return result;
}

PageRange range(std::uint64_t first, std::uint64_t count) { return PageRange::make(PageNumber(first), count).value(); }

bool contains(const std::vector<Span>& ascending, std::uint64_t page) {
  const auto after = std::ranges::upper_bound(ascending, page, {}, &Span::first);
  return after != ascending.begin() && page - std::prev(after)->first < std::prev(after)->count;
}

/// Ascending, and joined where they touch.
std::vector<Span> joined(std::vector<Span> all) {
  std::ranges::sort(all, {}, &Span::first);
  std::vector<Span> result;
  for (const Span& span : all) {
    if (span.count == 0) continue;
    if (!result.empty() && span.first <= result.back().first + result.back().count)
      result.back().count = std::max(result.back().count, span.first + span.count - result.back().first);
    else
      result.push_back(span);
  }
  return result;
}

/// What of `ascending` is not in the pages.
std::vector<Span> without(const std::vector<Span>& ascending, std::uint64_t first, std::uint64_t count) {
  std::vector<Span> result;
  for (const Span& span : ascending) {
    const std::uint64_t end = span.first + span.count;
    if (span.first < first) result.push_back({span.first, std::min(end, first) - span.first});
    const std::uint64_t after = std::max(span.first, first + count);
    if (after < end) result.push_back({after, end - after});
  }
  return result;
}

bool is_zero(const std::byte* page) {
  std::uint64_t any = 0;
  for (std::size_t at = 0; at < page_size; at += sizeof any) {
    std::uint64_t word;
    std::memcpy(&word, page + at, sizeof word);
    any |= word;
  }
  return any == 0;
}

} // namespace

SurveyOptions options_of(SurveyMode mode, std::uint8_t mode_options) {
  SurveyOptions options;
  if (mode == SurveyMode::content_check) {
    const ContentCheckOptions check{.parallel_tasks = 2, .scan = static_cast<ZeroScan>(mode_options & 3)};
    options.content_check = check;
  }
  if (mode == SurveyMode::legacy) options.source = EvidenceSource::legacy;
  return options;
}

std::vector<std::string> contradictions(const Survey& survey, const GuestMemory& memory, const SurveyOptions& options) {
  std::vector<std::string> problems;
  const auto map = memory.snapshot();
  if (survey.ram != map->pages(RegionKind::ram)) problems.emplace_back("survey: its RAM is not the map's");
  PageSet both = survey.zeroed();
  both.intersect(survey.touched);
  if (!both.empty()) problems.emplace_back("survey: pages are zeroed and touched");
  PageSet rest = survey.zeroed();
  rest.remove(survey.ram);
  if (!rest.empty()) problems.emplace_back("survey: zeroed pages are no RAM");
  rest = survey.touched;
  rest.remove(survey.ram);
  if (!rest.empty()) problems.emplace_back("survey: touched pages are no RAM");
  rest = survey.ram;
  rest.remove(survey.touched);
  rest.remove(options.leave_out);
  if (rest != survey.zeroed()) problems.emplace_back("survey: zeroed is not RAM without touched and left out");
  if (survey.left_out != options.leave_out)
    problems.emplace_back("survey: what was left out is not what it was asked to");
  if (survey.largest_zeroed(255) != rest.largest(255))
    problems.emplace_back("survey: the largest are not those of all");
  if (survey.regions.size() != map->regions().size()) problems.emplace_back("survey: a region has no report");
  std::uint64_t touched = 0;
  for (const RegionSurvey& region : survey.regions) {
    if (region.kind != RegionKind::ram) continue;
    const std::uint64_t left = region.pages.count() - region.zeroed_pages;
    if (left > region.touched_pages) problems.emplace_back("survey: a region has more touched pages than evidence");
    touched += left;
  }
  if (touched > survey.touched.page_count()) problems.emplace_back("survey: regions have more touched pages than all");
  return problems;
}

Answered real_surveyor(const GuestMemory& memory, const SurveyOptions& options, GuestAddress output) {
  Answered answered;
  const Survey direct = memory.survey(options);
  answered.direct = spans(direct.zeroed());
  answered.problems = contradictions(direct, memory, options);
  for (const auto& [pages, by] : direct.touched_map().entries()) {
    const Span span{pages.first().value(), pages.count()};
    if (by.has(Toucher::host)) answered.by_host.push_back(span);
    if (by.has(Toucher::guest)) answered.by_guest.push_back(span);
  }
  answered.by_host = joined(std::move(answered.by_host));
  answered.by_guest = joined(std::move(answered.by_guest));
  answered.names_writers = true;
  HvOptions offered;
  offered.survey = options;
  offered.on_boot_zeroed = [&](const BootZeroedAnswer& answer) { answered.zeroed = spans(answer.zeroed()); };
  auto hypercalls = ExtendedHypercalls::create(memory, std::move(offered));
  if (!hypercalls) {
    answered.problems.push_back(hypercalls.error().message());
    return answered;
  }
  const auto result = hypercalls->handle({.control = call_boot_zeroed, .output = output});
  answered.status = result.value_or(~std::uint64_t{0});
  return answered;
}

void Figures::add(const Figures& other) {
  cases += other.cases;
  page_checks += other.page_checks;
  data_pages += other.data_pages;
  reported_pages += other.reported_pages;
  unsound += other.unsound;
  missed += other.missed;
  for (std::size_t i = 0; i < missed_for.size(); ++i)
    missed_for[i] += other.missed_for[i];
  swapped_pages += other.swapped_pages;
  substituted_regions += other.substituted_regions;
  for (std::size_t i = 0; i < done.size(); ++i) {
    done[i] += other.done[i];
    refused[i] += other.refused[i];
  }
}

std::expected<Oracle, std::string> Oracle::start() {
  auto helper = Helper::start();
  if (!helper) return std::unexpected(helper.error());
  return Oracle(std::move(*helper));
}

std::expected<void, std::string> Oracle::add_vcpu() {
  auto guest = Guest::start();
  if (!guest) return std::unexpected(guest.error());
  guest_.emplace(std::move(*guest));
  return {};
}

/// One case on its way.
class Run {
public:
  Run(Oracle& oracle, const Case& what) : oracle_(oracle), case_(what) {}
  Run(const Run&) = delete;
  Run& operator=(const Run&) = delete;
  ~Run() {
    for (const pid_t child : children_)
      bury(child);
    end_log();
    if (oracle_.guest_ && guest_has_memory_) static_cast<void>(oracle_.guest_->set_memory({}));
  }

  Outcome carry_out(const Surveyor& surveyor) {
    outcome_.figures.cases = 1;
    if (!lay_out()) return std::move(outcome_);
    // A promise that nothing was written yet is for the beginning only.
    const bool is_late = (case_.mode_options & 2) != 0;
    const std::size_t proofs_at = is_late ? case_.steps.size() / 2 : 0;
    for (std::size_t i = 0; i <= case_.steps.size() && outcome_.holds(); ++i) {
      step_ = i;
      if (i == proofs_at) begin_proofs(!is_late && (case_.mode_options & 1) != 0);
      if (i == case_.steps.size()) break;
      const bool done = apply(case_.steps[i]);
      ++(done ? outcome_.figures.done
              : outcome_.figures.refused)[static_cast<unsigned>(case_.steps[i].writer) % writer_kinds];
    }
    if (outcome_.holds()) ask(surveyor);
    return std::move(outcome_);
  }

private:
  using Live = std::unique_ptr<LiveRegion>;

  template <class... Values>
  void problem(const char* format, Values... values) {
    if (outcome_.problems.size() >= most_problems) return;
    char line[256];
    if constexpr (sizeof...(values) == 0)
      std::snprintf(line, sizeof line, "%s", format);
    else
      std::snprintf(line, sizeof line, format, values...);
    outcome_.problems.emplace_back(line);
  }

  static void bury(pid_t child) {
    kill(child, SIGKILL);
    while (waitpid(child, nullptr, 0) < 0 && errno == EINTR) {
    }
  }

  /// The memory that `spec` asks for, or anonymous memory where the host has none of that kind.
  Live make(RegionSpec spec, std::uint64_t first_page) {
    auto live = LiveRegion::make(spec, first_page);
    if (!live) {
      ++outcome_.figures.substituted_regions;
      spec.memory = Memory::anonymous;
      live = LiveRegion::make(spec, first_page);
    }
    if (!live) {
      problem("driver: no memory: %s", live.error().c_str());
      return nullptr;
    }
    return std::move(*live);
  }

  bool lay_out() {
    std::uint64_t next = 0;
    for (std::size_t i = 0; i < case_.regions.size(); ++i) {
      RegionSpec spec = case_.regions[i];
      if (i == 0) spec.rom = false; // somewhere the answer must go
      next += spec.hole_before;
      Live live = make(spec, next);
      if (!live) return false;
      next += live->pages();
      lives_.push_back(std::move(live));
    }
    if (lives_.empty() || next > guest_code_base / page_size) {
      problem("driver: the map is empty or too large");
      return false;
    }
    return publish();
  }

  bool publish() {
    std::vector<Region> regions;
    for (const Live& live : lives_)
      regions.push_back(live->region());
    auto map = MemoryMap::make(std::move(regions));
    if (!map) {
      problem("driver: %s", map.error().message().c_str());
      return false;
    }
    memory_.replace(std::move(*map));
    return true;
  }

  // -------------------------------------------------------------------------------------------------------- proofs

  static bool is_provable(const LiveRegion& live) {
    const Memory memory = live.spec().memory;
    return !live.spec().rom && memory != Memory::unknown && memory != Memory::shared_file && !is_private_file(memory);
  }

  void begin_proofs(bool is_promised) {
    if (case_.mode == SurveyMode::write_watch)
      for (const Live& live : lives_)
        watch(*live, is_promised);
    if (case_.mode == SurveyMode::dirty_log) begin_log(is_promised);
  }

  /// Where this kernel has no watch, the case goes on without.
  void watch(LiveRegion& live, bool is_promised) {
    if (!is_provable(live) || live.proof() == Proof::watch) return;
    const bool has_zeros_only = [&] {
      for (std::uint32_t page = 0; page < live.pages(); ++page)
        if (live.content(page) != Content::zero) return false;
      return true;
    }();
    is_promised = is_promised && has_zeros_only;
    const WriteWatchOptions options{.baseline = is_promised ? Baseline::promise : Baseline::content,
                                    .written_through_this_mapping_only = is_shared(live.spec().memory)};
    const auto armed = memory_.arm_write_watch(live.region().start(), options);
    if (!armed) {
      if (armed.error().code != MemoryErrc::unavailable || test::machine_facts().async_write_protect)
        problem("no write watch: %s", armed.error().message().c_str());
      return;
    }
    live.begin_proof(Proof::watch, is_promised);
  }

  void begin_log(bool is_promised) {
    if (!guest_sees_memory()) return;
    const bool is_complete = (case_.mode_options & 4) == 0;
    const WriteLogOptions options{.baseline = is_promised ? Baseline::promise : Baseline::content,
                                  .complete = is_complete};
    auto started = start_dirty_log(*oracle_.guest_, memory_, options);
    if (!started) {
      problem("no dirty log: %s", started.error().c_str());
      return;
    }
    log_.emplace(std::move(*started));
    has_complete_log_ = is_complete;
    for (const Live& live : lives_) {
      live->forget_writers();
      if (is_complete && is_provable(*live)) live->begin_proof(Proof::log, is_promised);
    }
  }

  void end_log() {
    if (!log_) return;
    if (const auto stopped = log_->stop(); !stopped) problem("%s", stopped.error().message().c_str());
    log_.reset();
    has_complete_log_ = false;
    for (const Live& live : lives_)
      if (live) live->end_proof();
  }

  /// What the embedder has promised that nobody does.
  [[nodiscard]] bool breaks_promise(const Step& step, const LiveRegion& live) const {
    const bool is_watched_shared = live.proof() == Proof::watch && is_shared(live.spec().memory);
    switch (step.writer) {
    case Writer::other_mapping:
    case Writer::other_pwrite:
      return is_watched_shared || has_complete_log_;
    case Writer::fork_child:
      return is_watched_shared || (has_complete_log_ && is_shared(live.spec().memory));
    case Writer::raw_pointer:
    case Writer::scatter:
    case Writer::read_from_pipe:
    case Writer::process_vm_writev:
    case Writer::data_then_zero:
      return has_complete_log_;
    case Writer::zero_write:
      return has_complete_log_ && (step.variant & 1) == 0;
    default:
      return false;
    }
  }

  // ------------------------------------------------------------------------------------------------------- writers

  /// Whether a writer has something to do with a kind of memory.
  static bool suits(Writer writer, Memory memory) {
    switch (writer) {
    case Writer::drop_entries:
      return is_shared(memory);
    case Writer::other_mapping:
    case Writer::allocate:
      return is_shared_file(memory);
    case Writer::other_pwrite: // hugetlbfs takes no write(2)
      return is_shared_file(memory) && !is_hugetlb(memory);
    default:
      return true;
    }
  }

  bool apply(const Step& step) {
    std::size_t number = step.region % lives_.size();
    for (std::size_t i = 0; i < lives_.size() && !suits(step.writer, lives_[number]->spec().memory); ++i)
      number = (number + 1) % lives_.size();
    if (!suits(step.writer, lives_[number]->spec().memory)) return false;
    LiveRegion& live = *lives_[number];
    if (breaks_promise(step, live)) return false;
    const std::uint32_t page = step.page % live.pages();
    const std::uint32_t count = std::clamp<std::uint32_t>(step.count, 1, live.pages() - page);
    const std::uint8_t value = step.value == 0 ? 1 : step.value;
    const std::uint32_t at = data_at[step.variant % data_at.size()];
    switch (step.writer) {
    case Writer::typed_write:
      return typed_write(live, page, count, value, at, (step.variant & 4) != 0);
    case Writer::raw_pointer:
      raw_store(live, page, count, value, at);
      live.wrote(page, count, Content::data);
      return true;
    case Writer::scatter:
      for (std::uint32_t i = page % 2; i < std::min<std::uint32_t>(live.pages(), 1400); i += 2 + step.variant % 2) {
        raw_store(live, i, 1, value, at);
        live.wrote(i, 1, Content::data);
      }
      return true;
    case Writer::zero_write:
      if ((step.variant & 1) != 0) return clear(live, page, count);
      raw_store(live, page, count, 0, zero_at);
      live.touched(page, count, Reason::written);
      return true;
    case Writer::data_then_zero:
      raw_store(live, page, count, value, at);
      live.wrote(page, count, Content::data);
      return clear(live, page, count);
    case Writer::read_touch:
      for (std::uint32_t i = 0; i < count; ++i)
        static_cast<void>(*static_cast<volatile std::byte*>(live.host(page + i) + at));
      live.touched(page, count, Reason::read);
      return true;
    case Writer::read_from_pipe:
      return read_from_pipe(live, page, count, value, at);
    case Writer::process_vm_writev:
      return written(live, page, count, oracle_.helper_.write_process(live.host(page), count, at, value));
    case Writer::other_mapping:
    case Writer::other_pwrite:
      return write_from_other_process(live, page, count, value, at, step.writer == Writer::other_pwrite);
    case Writer::fork_child:
      return fork_child(live, page, count, value, at, (step.variant & 4) != 0);
    case Writer::discard:
      return discard(live, page, count, step.variant);
    case Writer::library_discard:
      return library_discard(live, page, count, (step.variant & 6) == 6);
    case Writer::heat_hint:
      return heat_hint(live, page, count, step.variant);
    case Writer::reset:
      return reset(step);
    case Writer::drop_entries:
      return madvise(live.host(page), count * page_size, MADV_DONTNEED) == 0;
    case Writer::allocate:
      return allocate(live, page, count);
    case Writer::populate: {
      if (step.variant >= 6 && live.pages() <= most_populated) {
        live.touched(0, live.pages(), Reason::populated);
        return live.region().populate().has_value();
      }
      const bool writes = (step.variant & 1) == 0;
      live.touched(page, count, writes ? Reason::populated : Reason::read);
      return madvise(live.host(page), count * page_size, writes ? madv_populate_write : madv_populate_read) == 0;
    }
    case Writer::set_huge_pages: {
      const auto use = step.variant % 2 == 0 ? HugePages::preferred : HugePages::never;
      const bool done = live.region().set_huge_pages(use).has_value();
      if (done && use == HugePages::preferred) live.wants_huge_pages();
      return done;
    }
    case Writer::remap:
      return remap(number, step);
    case Writer::replace:
      return publish();
    case Writer::page_out: {
      // A page that was allocated and never written goes to swap as the zeros that it reads.
      if (live.facts.allocated_unwritten) live.touched(0, live.pages(), Reason::populated);
      live.facts.paged_out = true;
      const bool all = (step.variant & 1) != 0;
      return madvise(live.host(all ? 0 : page), (all ? live.pages() : count) * page_size, madv_pageout) == 0;
    }
    case Writer::cold:
      return madvise(live.host(page), count * page_size, madv_cold) == 0;
    case Writer::collapse:
      return collapse(live);
    case Writer::compact:
      return compact();
    case Writer::survey: {
      const SurveyOptions options = options_of(step.variant % 2 == 0 ? SurveyMode::newest : SurveyMode::legacy);
      for (const std::string& line : contradictions(memory_.survey(options), memory_, options))
        problem("%s", line.c_str());
      return true;
    }
    case Writer::mark:
      memory_.mark_touched(range(live.first_page() + page, count), Toucher::device);
      marked_.push_back({live.first_page() + page, count});
      marked_ = joined(std::move(marked_));
      return true;
    case Writer::vcpu_store:
      if (live.spec().rom || !guest_sees_memory()) return false;
      live.written_by(page, count, by_vcpu);
      return ran(oracle_.guest_->access((live.first_page() + page) * page_size + at, count, value)) &&
             written(live, page, count, 0);
    case Writer::vcpu_read:
      if (!guest_sees_memory()) return false;
      live.touched(page, count, Reason::read);
      live.written_by(page, count, read_by_vcpu);
      return ran(oracle_.guest_->access((live.first_page() + page) * page_size + at, count, std::nullopt));
    case Writer::vcpu_page_walk:
      return walk(live, page);
    }
    return false;
  }

  static void raw_store(const LiveRegion& live, std::uint32_t page, std::uint32_t count, std::uint8_t value,
                        std::uint32_t at) {
    for (std::uint32_t i = 0; i < count; ++i)
      *static_cast<volatile std::byte*>(live.host(page + i) + at) = std::byte{value};
  }

  /// Of a writer with an errno.
  static bool written(LiveRegion& live, std::uint32_t page, std::uint32_t count, int error) {
    if (error == 0) {
      live.wrote(page, count, Content::data);
      return true;
    }
    // How far it came is not known.
    for (std::uint32_t i = page; i < page + count; ++i)
      live.set_content(i, Content::any);
    live.touched(page, count, Reason::written);
    return false;
  }

  bool typed_write(LiveRegion& live, std::uint32_t page, std::uint32_t count, std::uint8_t value, std::uint32_t at,
                   bool whole_pages) {
    const GuestAddress start((live.first_page() + page) * page_size);
    MemoryResult<void> done;
    if (whole_pages || live.spec().rom) {
      std::vector<std::byte> bytes(count * page_size);
      for (std::uint32_t i = 0; i < count; ++i)
        bytes[i * page_size + at] = std::byte{value};
      done = live.spec().rom ? memory_.load(start, bytes) : memory_.write(start, bytes);
    } else {
      for (std::uint32_t i = 0; i < count && done; ++i)
        done = memory_.write_value(GuestAddress(start.value() + i * page_size + at), value);
    }
    if (!done) problem("driver: step %zu: %s", step_, done.error().message().c_str());
    live.written_by(page, count, by_host_accessor);
    return written(live, page, count, done ? 0 : EIO);
  }

  bool clear(LiveRegion& live, std::uint32_t page, std::uint32_t count) {
    const std::vector<std::byte> zeros(count * page_size);
    const auto done = memory_.load(GuestAddress((live.first_page() + page) * page_size), zeros);
    if (!done) problem("driver: step %zu: %s", step_, done.error().message().c_str());
    live.written_by(page, count, by_host_accessor);
    live.wrote(page, count, Content::zero);
    return done.has_value();
  }

  static bool read_from_pipe(LiveRegion& live, std::uint32_t page, std::uint32_t count, std::uint8_t value,
                             std::uint32_t at) {
    int ends[2];
    if (pipe2(ends, O_CLOEXEC) != 0) return false;
    int error = 0;
    for (std::uint32_t i = 0; i < count && error == 0; ++i) {
      if (write(ends[1], &value, 1) != 1 || read(ends[0], live.host(page + i) + at, 1) != 1)
        error = errno != 0 ? errno : EIO;
    }
    close(ends[0]);
    close(ends[1]);
    return written(live, page, count, error);
  }

  bool write_from_other_process(LiveRegion& live, std::uint32_t page, std::uint32_t count, std::uint8_t value,
                                std::uint32_t at, bool with_pwrite) {
    const std::uint64_t offset = live.file_offset() + page * page_size;
    return written(live, page, count,
                   with_pwrite ? oracle_.helper_.write(live.file(), offset, count, at, value)
                               : oracle_.helper_.store(live.file(), offset, count, at, value));
  }

  bool fork_child(LiveRegion& live, std::uint32_t page, std::uint32_t count, std::uint8_t value, std::uint32_t at,
                  bool stays) {
    int ends[2];
    if (pipe2(ends, O_CLOEXEC) != 0) return false;
    const pid_t parent = getpid();
    const pid_t child = fork();
    if (child == 0) {
      prctl(PR_SET_PDEATHSIG, SIGKILL);
      if (getppid() != parent) _exit(1);
      raw_store(live, page, count, value, at);
      static_cast<void>(!write(ends[1], "", 1));
      if (!stays) _exit(0);
      for (;;)
        pause();
    }
    close(ends[1]);
    char byte = 0;
    ssize_t got = 0;
    do
      got = child < 0 ? -1 : read(ends[0], &byte, 1);
    while (got < 0 && errno == EINTR);
    close(ends[0]);
    if (child < 0) return false;
    if (stays)
      children_.push_back(child);
    else
      bury(child);
    // What a child does to private memory is its own; but for reading what is behind it.
    if (is_private_file(live.spec().memory)) live.touched(page, count, Reason::read);
    if (!is_shared(live.spec().memory)) return got == 1;
    return written(live, page, count, got == 1 ? 0 : EIO);
  }

  /// Whole huge pages where there is nothing smaller.
  static void widen(const LiveRegion& live, std::uint32_t& page, std::uint32_t& count) {
    if (!is_hugetlb(live.spec().memory)) return;
    const std::uint32_t end = (page + count + huge_pages - 1) / huge_pages * huge_pages;
    page = page / huge_pages * huge_pages;
    count = end - page;
  }

  static bool discard(LiveRegion& live, std::uint32_t page, std::uint32_t count, std::uint8_t variant) {
    widen(live, page, count);
    void* const start = live.host(page);
    const std::size_t bytes = count * page_size;
    const Memory memory = live.spec().memory;
    const bool is_anonymous = memory == Memory::anonymous || memory == Memory::adopted_anonymous;
    if (is_anonymous && variant % 4 == 3) {
      // Gone at some time, or not.
      if (madvise(start, bytes, MADV_FREE) != 0) return false;
      live.freed(page, count);
      return true;
    }
    int result = 0;
    if (is_shared_file(memory) && variant % 2 == 0)
      result = fallocate(live.file(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                         static_cast<off_t>(live.file_offset() + page * page_size), static_cast<off_t>(bytes));
    else
      result = madvise(start, bytes, is_shared(memory) ? MADV_REMOVE : MADV_DONTNEED);
    if (result != 0) { // locked memory, most often
      // What took the place of a file's pages is not locked, and is gone by then.
      if (live.facts.replaced) live.freed(page, count);
      return false;
    }
    live.discarded(page, count);
    return true;
  }

  bool library_discard(LiveRegion& live, std::uint32_t page, std::uint32_t count, bool is_scattered) {
    std::vector<Span> parts; // counted in the region
    if (is_scattered) {
      for (std::uint32_t i = page % 2; i < std::min<std::uint32_t>(live.pages(), 1400); i += 2)
        parts.push_back({i, 1});
    } else {
      parts.push_back({page, count});
    }
    PageSet pages;
    for (const Span& part : parts)
      pages.add(range(live.first_page() + part.first, part.count));
    const auto done = memory_.discard(pages);
    const bool is_refused = live.spec().rom || live.spec().memory == Memory::unknown;
    if (done.has_value() == is_refused)
      problem("step %zu: discard of %s: %s", step_, to_string(live.spec().memory),
              done ? "done" : done.error().message().c_str());
    if (!done) return false;
    if (done->freed_pages + done->cleared_pages != pages.page_count())
      problem("step %zu: discard counts %llu pages", step_,
              static_cast<unsigned long long>(done->freed_pages + done->cleared_pages));
    for (const Span& part : parts) {
      discarded_by_library(live, static_cast<std::uint32_t>(part.first), static_cast<std::uint32_t>(part.count),
                           done->cleared_pages > 0);
    }
    return true;
  }

  /// Ranges as the guest lists them: some large, the others of `most` small pages.
  static std::vector<std::uint64_t> listed(std::uint64_t first, std::uint64_t count, std::uint64_t most) {
    std::vector<std::uint64_t> list;
    for (const std::uint64_t end = first + count; first < end && list.size() < hv_memory_heat_hint_max_ranges;) {
      const std::uint64_t large = first % huge_pages == 0 ? (end - first) / huge_pages : 0;
      const std::uint64_t pages = large > 0 ? large * huge_pages : std::min(end - first, most);
      list.push_back(first << page_shift | (large > 0 ? 1U << 11 | (large - 1) : pages - 1));
      first += pages;
    }
    return list;
  }

  bool heat_hint(LiveRegion& live, std::uint32_t page, std::uint32_t count, std::uint8_t variant) {
    const auto heat = variant == 6 ? HvMemoryHeat::cold : variant == 7 ? HvMemoryHeat::hot : HvMemoryHeat::cold_discard;
    const bool is_file = live.spec().memory == Memory::shared_file || is_private_file(live.spec().memory);
    if (heat == HvMemoryHeat::hot && is_file) return false; // the kernel reads ahead, and so fills holes with zeros
    const auto guard = FaultGuard::install();               // without one, huge pages of the pool are kept
    if (!guard) return false;
    std::vector<std::uint64_t> input = listed(live.first_page() + page, count, variant % 2 == 0 ? 2048 : 7);
    const std::size_t reps = input.size();
    input.insert(input.begin(), static_cast<std::uint64_t>(heat));
    HeatDone sum;
    HeatOptions options{.policy = standard_heat_policy(memory_)};
    options.on_hint = [&](const HeatHinted& hinted) {
      sum.freed_pages += hinted.done.freed_pages;
      sum.kept_pages += hinted.done.kept_pages;
      if (heat == HvMemoryHeat::cold_discard) given_back(live, hinted.pages, hinted.done);
    };
    const HvCallRow row = memory_heat_hint_row(memory_, options);
    // With no time, each step is a part of the list.
    HvCheckedCall call{
        .control = {std::uint64_t{reps} << 32}, .input = std::as_bytes(std::span(input)), .output = GuestAddress(0)};
    if (variant >= 4) call.until = {};
    HvCallAnswer answer = row.handler(call);
    for (; answer.goes_on; answer = row.handler(call))
      call.control = call.control.with_rep_start(answer.reps_completed);
    const bool is_refused = live.spec().rom || live.spec().memory == Memory::unknown;
    const bool is_done = answer.status == HvStatus::success;
    if (is_done && is_refused && (live.spec().rom || heat == HvMemoryHeat::cold_discard))
      problem("step %zu: hint of %s: done", step_, to_string(live.spec().memory));
    if (!is_done && !is_refused && (answer.status != HvStatus::invalid_parameter || sum.freed_pages != 0))
      problem("step %zu: hint of %s: status %u, %llu pages freed", step_, to_string(live.spec().memory),
              static_cast<unsigned>(answer.status), static_cast<unsigned long long>(sum.freed_pages));
    return is_done;
  }

  /// A part of a cold discard.
  void given_back(LiveRegion& live, const PageSet& pages, const HeatDone& done) {
    const auto freed = [&](std::uint64_t first, std::uint64_t end, bool is_whole) {
      const auto page = static_cast<std::uint32_t>(first - live.first_page());
      const auto count = static_cast<std::uint32_t>(end - first);
      if (is_whole)
        discarded_by_library(live, page, count, false);
      else // marks stay, and so does what a watch has seen
        live.discarded(page, count);
    };
    if (done.cleared_pages != 0) problem("step %zu: a hint cleared pages", step_);
    for (const PageRange& range : pages.ranges()) {
      if (done.freed_pages == 0) continue;
      std::uint64_t first = range.first().value();
      std::uint64_t end = range.end().value();
      if (done.kept_pages == 0) {
        freed(first, end, true);
      } else if (is_hugetlb(live.spec().memory)) {
        const std::uint64_t base = live.first_page();
        first = base + (first - base + huge_pages - 1) / huge_pages * huge_pages;
        end = base + (end - base) / huge_pages * huge_pages;
        if (first < end) freed(first, end, false);
      } else {
        // Those whose file's data would come back stay.
        live.freed(static_cast<std::uint32_t>(first - live.first_page()), static_cast<std::uint32_t>(end - first));
      }
    }
  }

  void discarded_by_library(LiveRegion& live, std::uint32_t page, std::uint32_t count, bool some_are_cleared) {
    marked_ = without(marked_, live.first_page() + page, count);
    // Nothing else is ever only cleared, on a kernel that can discard locked memory; a part of a huge page always is.
    const bool may_be_cleared = is_hugetlb(live.spec().memory) || is_private_file(live.spec().memory) ||
                                live.spec().memory == Memory::shared_file || live.is_locked();
    if (some_are_cleared && !may_be_cleared) problem("step %zu: pages were only cleared", step_);
    live.discarded_by_library(page, count, some_are_cleared && may_be_cleared);
  }

  bool reset(const Step& step) {
    PageSet keep;
    std::vector<Span> kept; // of each region of RAM, counted in it
    bool is_refused = false;
    for (const Live& live : lives_) {
      const std::uint32_t page = step.page % live->pages();
      Span span{page, std::min<std::uint64_t>(std::uint64_t{step.count} * 16, live->pages() - page)};
      if (step.variant % 2 == 0) span = {0, 0};
      kept.push_back(span);
      if (span.count > 0) keep.add(range(live->first_page() + span.first, span.count));
      if (!live->spec().rom && live->spec().memory == Memory::unknown && span.count < live->pages()) is_refused = true;
    }
    const auto done = memory_.reset(keep);
    if (done.has_value() == is_refused)
      problem("step %zu: reset: %s", step_, done ? "done" : done.error().message().c_str());
    if (!done) return false;
    for (std::size_t i = 0; i < lives_.size(); ++i) {
      LiveRegion& live = *lives_[i];
      if (live.spec().rom) continue;
      const auto first = static_cast<std::uint32_t>(kept[i].first);
      const auto end = static_cast<std::uint32_t>(kept[i].first + kept[i].count);
      const bool may_be_cleared =
          done->cleared_pages > 0 && (is_hugetlb(live.spec().memory) || live.is_locked() ||
                                      is_private_file(live.spec().memory) || live.spec().memory == Memory::shared_file);
      if (first > 0) discarded_by_library(live, 0, first, may_be_cleared);
      if (end < live.pages()) discarded_by_library(live, end, live.pages() - end, may_be_cleared);
    }
    return true;
  }

  static bool allocate(LiveRegion& live, std::uint32_t page, std::uint32_t count) {
    widen(live, page, count);
    if (fallocate(live.file(), FALLOC_FL_KEEP_SIZE, static_cast<off_t>(live.file_offset() + page * page_size),
                  static_cast<off_t>(count * page_size)) != 0)
      return false;
    // What a hugetlb file has, written or not, is in its page cache.
    if (is_hugetlb(live.spec().memory)) live.touched(page, count, Reason::populated);
    // A second time, shmem clears what was never written, and takes it for data from then on. So does a disk's file
    // system with what was read, or read ahead, or lies beside what was written.
    if (live.facts.allocated_unwritten || live.spec().memory == Memory::shared_file)
      live.touched(page, count, Reason::populated);
    live.facts.allocated_unwritten = true;
    return true;
  }

  bool collapse(LiveRegion& live) {
    const auto base =
        static_cast<std::uint32_t>(reinterpret_cast<std::uintptr_t>(live.host(0)) / page_size % huge_pages);
    const std::uint32_t first = (huge_pages - base) % huge_pages;
    if (live.pages() < first + huge_pages || is_hugetlb(live.spec().memory)) return false;
    const std::uint32_t count = (live.pages() - first) / huge_pages * huge_pages;
    const bool done = madvise(live.host(first), count * page_size, madv_collapse) == 0;
    // One that fails may have come some way.
    if (done || live.spec().thp != Thp::forbidden) {
      live.touched(first, count, done ? Reason::populated : Reason::huge_page);
      live.facts.collapsed = true;
    }
    return done;
  }

  static bool compact() {
    const int fd = open("/proc/sys/vm/compact_memory", O_WRONLY | O_CLOEXEC);
    if (fd < 0) return false;
    const bool done = write(fd, "1", 1) == 1;
    close(fd);
    return done;
  }

  bool remap(std::size_t number, const Step& step) {
    RegionSpec spec = lives_[number]->spec();
    const std::uint64_t first_page = lives_[number]->first_page();
    spec.memory = static_cast<Memory>(step.value % memory_kinds);
    if (is_hugetlb(spec.memory) && (spec.pages % huge_pages != 0 || !is_hugetlb(case_.regions[number].memory)))
      spec.memory = Memory::memfd;
    spec.before = Before::nothing;
    spec.file_seed += 1;
    end_log();
    if (oracle_.guest_ && guest_has_memory_) {
      // KVM has a mapping in a slot as long as it is there.
      static_cast<void>(oracle_.guest_->set_memory({}));
      guest_has_memory_ = false;
    }
    if (auto gone = memory_.remove_region(GuestAddress(first_page * page_size)); !gone) {
      problem("driver: step %zu: %s", step_, gone.error().message().c_str());
      return false;
    }
    lives_[number].reset();
    lives_[number] = make(spec, first_page);
    if (!lives_[number]) return false;
    if (auto added = memory_.add_region(lives_[number]->region()); !added) {
      problem("driver: step %zu: %s", step_, added.error().message().c_str());
      return false;
    }
    if (case_.mode == SurveyMode::write_watch && step.variant % 2 == 0) watch(*lives_[number], step.variant % 4 == 0);
    return true;
  }

  bool ran(const std::expected<void, std::string>& result) {
    if (!result) problem("driver: step %zu: %s", step_, result.error().c_str());
    return result.has_value();
  }

  bool guest_sees_memory() {
    if (!oracle_.guest_) return false;
    if (guest_has_memory_) return true;
    std::vector<GuestSlot> slots;
    for (const Live& live : lives_)
      slots.push_back({live->first_page(), live->pages(), live->host(0), live->spec().rom});
    guest_has_memory_ = true;
    return ran(oracle_.guest_->set_memory(slots));
  }

  /// The guest walks tables in the region: KVM writes their accessed bits.
  bool walk(LiveRegion& live, std::uint32_t page) {
    constexpr std::uint32_t count = Guest::table_pages;
    if (live.spec().rom || live.pages() < count || !guest_sees_memory()) return false;
    page = std::min(page, live.pages() - count);
    const std::uint64_t address = (live.first_page() + page) * page_size;
    std::array<std::byte, Guest::table_pages * page_size> tables;
    Guest::write_tables(address, tables);
    if (auto loaded = memory_.load(GuestAddress(address), tables); !loaded) {
      problem("driver: step %zu: %s", step_, loaded.error().message().c_str());
      return false;
    }
    live.wrote(page, count, Content::data);
    live.written_by(page, count, by_host_accessor | by_vcpu);
    if (!ran(oracle_.guest_->walk(address, address, count))) return false;
    constexpr std::uint64_t accessed = 1 << 5;
    const auto entry = memory_.read_value<std::uint64_t>(GuestAddress(address));
    if (!entry || (*entry & accessed) == 0) problem("driver: step %zu: the walk left no accessed bit", step_);
    return true;
  }

  // -------------------------------------------------------------------------------------------------------- answer

  void ask(const Surveyor& surveyor) {
    std::vector<LiveRegion*> ram;
    std::uint64_t ram_pages = 0;
    for (const Live& live : lives_) {
      if (live->spec().rom) continue;
      ram.push_back(live.get());
      ram_pages += live->pages();
    }
    SurveyOptions options = options_of(case_.mode, case_.mode_options);
    std::uint64_t skip = case_.leave_out_page % ram_pages;
    std::uint64_t wanted = case_.leave_out_count;
    for (const LiveRegion* live : ram) {
      const std::uint64_t from = std::min<std::uint64_t>(skip, live->pages());
      const std::uint64_t count = std::min<std::uint64_t>(wanted, live->pages() - from);
      skip -= from;
      wanted -= count;
      if (count == 0) continue;
      left_out_.push_back({live->first_page() + from, count});
      options.leave_out.add(range(live->first_page() + from, count));
    }
    left_out_ = joined(std::move(left_out_));

    LiveRegion& home = *ram[case_.output_region % ram.size()];
    const std::uint32_t page = case_.output_page % home.pages();
    output_page_ = home.first_page() + page;
    const std::uint64_t at = case_.output_at_8 ? 8 : 0;
    count_swapped();

    std::vector<std::vector<bool>> readable;
    if (case_.mode == SurveyMode::content_check)
      for (const Live& live : lives_)
        readable.push_back(live->readable());
    std::vector<std::thread> threads;
    unsigned tasks = 0;
    if (options.content_check && (case_.mode_options & 4) != 0)
      options.content_check->executor = [&](std::function<void()> task) {
        const bool is_dropped = (case_.mode_options & 8) != 0 && ++tasks % 2 == 0;
        if (!is_dropped) threads.emplace_back(std::move(task));
      };

    Answered answered = surveyor(memory_, options, GuestAddress(output_page_ * page_size + at));
    for (std::thread& thread : threads)
      thread.join();
    home.wrote(page, 1, Content::any);
    for (const std::string& line : answered.problems)
      problem("%s", line.c_str());
    if (answered.status != 0) {
      problem("the hypercall's result is 0x%llx", static_cast<unsigned long long>(answered.status));
      return;
    }
    decode(home.host(page) + at, answered.zeroed);
    zeroed_ = joined(std::move(answered.zeroed));
    direct_ = joined(std::move(answered.direct));
    by_host_ = std::move(answered.by_host);
    by_guest_ = std::move(answered.by_guest);
    names_writers_ = answered.names_writers;
    for (std::size_t i = 0; i < lives_.size(); ++i) {
      if (!readable.empty()) readable_ = std::move(readable[i]);
      check(*lives_[i]);
    }
    const auto is_ram = [&](std::uint64_t number) {
      return std::ranges::any_of(ram,
                                 [&](const LiveRegion* live) { return number - live->first_page() < live->pages(); });
    };
    for (const std::vector<Span>* claim : {&reported_, &zeroed_, &direct_})
      for (const Span& span : *claim)
        for (std::uint64_t i = 0; i < span.count; ++i)
          if (!is_ram(span.first + i)) unsound("is no RAM", span.first + i, nullptr);
  }

  void count_swapped() {
    const int pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    if (pagemap < 0) return;
    const bool swaps = std::ranges::any_of(case_.steps, [](const Step& s) { return s.writer == Writer::page_out; });
    for (const Live& live : lives_) {
      if (!swaps) break;
      std::vector<std::uint64_t> entries(live->pages());
      const ssize_t bytes = static_cast<ssize_t>(entries.size() * sizeof(std::uint64_t));
      const auto from = static_cast<off_t>(reinterpret_cast<std::uintptr_t>(live->host(0)) / page_size * 8);
      if (pread(pagemap, entries.data(), static_cast<std::size_t>(bytes), from) != bytes) continue;
      // Documentation/admin-guide/mm/pagemap.rst: bit 62, page swapped.
      for (const std::uint64_t entry : entries)
        outcome_.figures.swapped_pages += entry >> 62 & 1;
    }
    close(pagemap);
  }

  /// The answer as the guest reads it, and whether it is the best that `zeroed` gives.
  void decode(const std::byte* output, const std::vector<Span>& zeroed) {
    std::array<std::uint64_t, answer_bytes / sizeof(std::uint64_t)> words;
    std::memcpy(words.data(), output, answer_bytes);
    if (words[0] > answer_ranges) {
      problem("the answer counts %llu ranges", static_cast<unsigned long long>(words[0]));
      return;
    }
    const auto count = static_cast<std::size_t>(words[0]);
    std::vector<Span> ranges;
    for (std::size_t i = 0; i < answer_ranges; ++i) {
      const Span span{words[1 + 2 * i], words[2 + 2 * i]};
      if (i < count)
        ranges.push_back(span);
      else if (span.first != 0 || span.count != 0)
        problem("the answer has something behind its last range");
    }
    std::vector<Span> best = joined(zeroed);
    std::ranges::sort(
        best, [](const Span& a, const Span& b) { return a.count != b.count ? a.count > b.count : a.first < b.first; });
    best.resize(std::min(best.size(), answer_ranges));
    const auto same = [](const Span& a, const Span& b) { return a.first == b.first && a.count == b.count; };
    if (!std::ranges::equal(ranges, best, same))
      problem("the answer is not the %zu largest ranges of what was found zeroed, largest first", best.size());
    for (const Span& span : ranges)
      if (span.count == 0 || span.count > guest_space_end / page_size) {
        problem("the answer has a range of %llu pages", static_cast<unsigned long long>(span.count));
        return;
      }
    reported_ = joined(std::move(ranges));
    is_full_ = count == answer_ranges;
  }

  void unsound(const char* why, std::uint64_t page, const LiveRegion* live) {
    ++outcome_.figures.unsound;
    problem("UNSOUND: page 0x%llx %s, and is reported%s%s", static_cast<unsigned long long>(page), why,
            live == nullptr ? "" : "; it is of ", live == nullptr ? "" : to_string(live->spec().memory));
  }

  void check(const LiveRegion& live) {
    constexpr std::uint32_t chunk = 64;
    const auto buffer = std::make_unique<std::byte[]>(chunk * page_size);
    // By the file where there is one, every other time: the guest's view and everyone else's are the same.
    const bool by_file =
        is_shared_file(live.spec().memory) && !is_hugetlb(live.spec().memory) && case_.output_page % 2 == 0;
    for (std::uint32_t first = 0; first < live.pages(); first += chunk) {
      const std::uint32_t count = std::min(chunk, live.pages() - first);
      const std::size_t bytes = count * page_size;
      if (!by_file)
        std::memcpy(buffer.get(), live.host(first), bytes);
      else if (pread(live.file(), buffer.get(), bytes, static_cast<off_t>(live.file_offset() + first * page_size)) !=
               static_cast<ssize_t>(bytes)) {
        problem("driver: pread of the file failed");
        return;
      }
      for (std::uint32_t i = 0; i < count; ++i)
        check_page(live, first + i, is_zero(buffer.get() + i * page_size));
    }
  }

  void check_page(const LiveRegion& live, std::uint32_t page, bool zero) {
    Figures& figures = outcome_.figures;
    const std::uint64_t number = live.first_page() + page;
    ++figures.page_checks;
    figures.data_pages += zero ? 0 : 1;
    const Content expected = live.content(page);
    if (expected != Content::any && (expected == Content::zero) != zero)
      problem("driver: page 0x%llx of %s holds %s, which is not what was done to it",
              static_cast<unsigned long long>(number), to_string(live.spec().memory), zero ? "zeros" : "data");
    if (live.spec().rom) return; // what is reported of it counts as no RAM

    const bool is_reported = contains(reported_, number);
    figures.reported_pages += is_reported ? 1 : 0;
    const bool is_output = number == output_page_;
    if (names_writers_ && !is_output) check_writers(live, page, number, zero);
    if (is_output && (is_reported || contains(zeroed_, number))) unsound("holds the answer", number, &live);
    if (is_output) return;
    const bool is_claimed = is_reported || contains(zeroed_, number) || contains(direct_, number);
    if (is_claimed && !zero) unsound("holds data", number, &live);
    if (is_claimed && contains(left_out_, number)) unsound("was to be left out", number, &live);
    if (is_claimed && contains(marked_, number)) unsound("was marked as touched", number, &live);
    if (is_reported || !zero) return;

    ++figures.missed;
    const Reason reason = reason_for(live, page, number);
    ++figures.missed_for[static_cast<unsigned>(reason)];
    if (reason == Reason::none)
      problem("MISSED: page 0x%llx (page %u of %s) is zero, and is missing for no reason",
              static_cast<unsigned long long>(number), page, to_string(live.spec().memory));
  }

  /// Nobody is named who did not write, and of data in the log, everyone is who did.
  void check_writers(const LiveRegion& live, std::uint32_t page, std::uint64_t number, bool zero) {
    const std::uint8_t who = log_ ? live.writers(page) : std::uint8_t{0};
    const bool says_host = contains(by_host_, number);
    const bool says_guest = contains(by_guest_, number);
    const auto complain = [&](const char* what) {
      problem("WRITER: page 0x%llx (page %u of %s) %s", static_cast<unsigned long long>(number), page,
              to_string(live.spec().memory), what);
    };
    if (says_guest && (who & (by_vcpu | read_by_vcpu)) == 0)
      complain("is said to be the guest's, which did not write it");
    if (says_host && (who & by_host_accessor) == 0) complain("is said to be the host's, whose accessors did not");
    if (zero || live.spec().memory == Memory::unknown) return;
    if (!says_guest && (who & by_vcpu) != 0) complain("holds data, was written by the guest, and is not said to be");
    if (!says_host && (who & by_host_accessor) != 0)
      complain("holds data, was written by an accessor, and is not said");
  }

  Reason reason_for(const LiveRegion& live, std::uint32_t page, std::uint64_t number) const {
    // The ranges that were chosen were compared with what they were chosen from.
    if (contains(zeroed_, number)) return is_full_ ? Reason::beyond_255 : Reason::none;
    if (contains(left_out_, number)) return Reason::left_out;
    if (contains(marked_, number)) return Reason::marked;
    Reason reason = live.reason(page, case_.mode);
    // Where their entries cannot be seen with the lock held, huge pages are counted, which says nothing beside shared
    // ones.
    const bool is_counted = case_.mode == SurveyMode::legacy || !test::machine_facts().async_write_protect;
    const auto is_huge_memfd = [](const Live& other) { return other->spec().memory == Memory::hugetlb_memfd; };
    if (live.spec().memory == Memory::hugetlb && is_counted && std::ranges::any_of(lives_, is_huge_memfd))
      reason = Reason::no_evidence;
    // The kernel may be taking back a huge page; mappings side by side may be one to it.
    const auto gives_up = [&](const Live& other) {
      return other->facts.given_up && (other.get() == &live || (other->may_be_merged() && live.may_be_merged()));
    };
    const auto has_huge = [](const Live& other) { return other->is_coarse() || other->facts.collapsed; };
    if (std::ranges::any_of(lives_, gives_up) && std::ranges::any_of(lives_, has_huge)) reason = Reason::no_evidence;
    const auto brings_it = [&](const Live& other) { return other.get() != &live && live.may_come_with(page, *other); };
    if (reason == Reason::none && std::ranges::any_of(lives_, brings_it)) reason = Reason::huge_page;
    if (reason == Reason::none) return Reason::none;
    // What is swapped out cannot be told from what was lost, but where the swap cache has it or it is protected.
    if (live.is_proven(page) && live.proof() == Proof::log && live.facts.paged_out && !is_shared(live.spec().memory))
      return Reason::absent;
    if (live.is_proven(page)) return Reason::none;
    if (case_.mode != SurveyMode::content_check || live.spec().memory == Memory::unknown) return reason;
    return readable_[page] ? Reason::none : Reason::absent;
  }

  Oracle& oracle_;
  const Case& case_;
  Outcome outcome_;
  std::vector<Live> lives_;
  GuestMemory memory_;
  std::vector<pid_t> children_;
  bool guest_has_memory_ = false;
  std::optional<DirtyLog> log_;
  bool has_complete_log_ = false;
  std::size_t step_ = 0;
  std::vector<Span> marked_, left_out_;
  std::uint64_t output_page_ = 0;
  std::vector<Span> reported_, zeroed_, direct_;
  std::vector<Span> by_host_, by_guest_;
  bool names_writers_ = false;
  std::vector<bool> readable_; ///< Of the region that is being checked, where content was looked at.
  bool is_full_ = false;
};

Outcome Oracle::run(const Case& what, const Surveyor& surveyor) { return Run(*this, what).carry_out(surveyor); }

} // namespace cppvmm::oracle

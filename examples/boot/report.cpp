#include "report.hpp"

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <utility>

namespace cppvmm::boot {
namespace {

using Json = nlohmann::ordered_json;

constexpr std::array<std::pair<zeroing::Seen, const char*>, 9> seen_words = {{
    {zeroing::seen_hypervisor, "hypervisor"},
    {zeroing::seen_interface, "interface"},
    {zeroing::seen_hypercall_msrs, "hypercall_msrs"},
    {zeroing::seen_vp_index, "vp_index"},
    {zeroing::seen_extended_calls, "extended_calls"},
    {zeroing::seen_hypercall_page, "hypercall_page"},
    {zeroing::asked_capabilities, "asked_capabilities"},
    {zeroing::asked_zeroed_memory, "asked_zeroed_memory"},
    {zeroing::gave_back, "gave_back"},
}};

/// The guest's own account: what it says, not what is known of it.
Json guest_json(const RunFigures& figures) {
  if (!figures.guest) return {};
  const zeroing::Report& guest = *figures.guest;
  const auto if_seen = [&](zeroing::Seen bit, std::uint64_t value) {
    return (guest.seen & bit) != 0 ? Json(value) : Json();
  };
  Json seen = Json::array();
  for (const auto& [bit, word] : seen_words)
    if ((guest.seen & bit) != 0) seen.push_back(word);
  Json by_cpu = Json::array();
  for (std::uint32_t cpu = 0; cpu < figures.options.cpus; ++cpu)
    by_cpu.push_back(guest.cpu_zeroed_pages[cpu]);
  return {
      {"seen", std::move(seen)},
      {"capabilities_result", if_seen(zeroing::asked_capabilities, guest.capabilities_result)},
      {"capabilities", if_seen(zeroing::asked_capabilities, guest.capabilities)},
      {"zeroed_memory_result", if_seen(zeroing::asked_zeroed_memory, guest.zeroed_result)},
      {"reported_ranges", if_seen(zeroing::asked_zeroed_memory, guest.reported_ranges)},
      {"lives_in_overlaps", guest.lives_in_overlaps},
      {"planned_ranges", guest.planned_ranges},
      {"planned_pages", guest.planned_pages},
      {"cpu_zeroed_pages", std::move(by_cpu)},
      {"given_back_pages", guest.given_back_pages},
      {"give_back_calls", guest.give_back_calls},
      {"give_back_failures", guest.give_back_failures},
      {"give_back_result", if_seen(zeroing::gave_back, guest.give_back_result)},
  };
}

Json number_or_null(const std::optional<std::uint64_t>& number) { return number ? Json(*number) : Json(); }

Json text_or_null(const std::optional<std::string>& text) { return text ? Json(*text) : Json(); }

Json watch_json(const std::optional<WatchFigures>& watch) {
  if (!watch) return {};
  return {{"written_pages", watch->written_pages},
          {"zero_pages", watch->zero_pages},
          {"us", watch->us},
          {"error", text_or_null(watch->error)}};
}

Json content_json(const std::optional<ContentFigures>& content) {
  if (!content) return {};
  return {{"checked_pages", content->checked_pages},
          {"zero_pages", content->zero_pages},
          {"absent_pages", content->absent_pages},
          {"unchecked_pages", content->unchecked_pages},
          {"us", content->us},
          {"error", text_or_null(content->error)}};
}

Json regions_json(const AnswerFigures& answer) {
  Json regions = Json::array();
  for (const auto& region : answer.regions)
    regions.push_back({{"first_page", region.first_page},
                       {"page_count", region.page_count},
                       {"kind", region.kind},
                       {"backing", region.backing},
                       {"evidence", region.evidence},
                       {"write_watch", watch_json(region.watch)},
                       {"dirty_log", watch_json(region.log)},
                       {"content_check", content_json(region.content)},
                       {"touched_pages", region.touched_pages},
                       {"zeroed_pages", region.zeroed_pages},
                       {"unaccounted_pages", region.unaccounted_pages},
                       {"given_up_pages", region.given_up_pages},
                       {"survey_us", region.survey_us},
                       {"error", text_or_null(region.error)}});
  return regions;
}

Json boots_json(const AnswerLog& answers) {
  Json boots = Json::array();
  for (const auto& answer : answers.boots)
    boots.push_back({{"boot", answer.boot},
                     {"reported_pages", answer.reported_pages},
                     {"touched_pages", answer.touched_pages},
                     {"range_count", answer.ranges},
                     {"unsound_pages", number_or_null(answer.unsound_pages)},
                     {"missed_zero_pages", number_or_null(answer.missed_zero_pages)},
                     {"survey_us", answer.survey_us}});
  return boots;
}

std::string mebibytes(std::uint64_t bytes) {
  char text[32];
  std::snprintf(text, sizeof text, "%.1f MiB", static_cast<double>(bytes) / (1 << 20));
  return text;
}

std::string share(std::uint64_t part, std::uint64_t whole) {
  char text[64];
  std::snprintf(text, sizeof text, "%llu of %llu pages (%.2f %%)", static_cast<unsigned long long>(part),
                static_cast<unsigned long long>(whole),
                whole == 0 ? 0.0 : 100.0 * static_cast<double>(part) / static_cast<double>(whole));
  return text;
}

/// What each boot was answered, as far as a line has room.
std::string by_boot(const AnswerLog& answers) {
  constexpr std::size_t most = 8;
  std::string text = "reported by boot";
  for (std::size_t i = 0; i < std::min(answers.boots.size(), most); ++i)
    text += (i == 0 ? " " : ", ") + std::to_string(answers.boots[i].reported_pages);
  return text + (answers.boots.size() > most ? ", ... pages" : " pages");
}

} // namespace

void AnswerLog::add(std::uint32_t boot, AnswerFigures answer) {
  ++given;
  BootAnswer kept{.boot = boot,
                  .reported_pages = answer.reported_pages,
                  .touched_pages = answer.touched_pages,
                  .ranges = answer.ranges.size(),
                  .unsound_pages = {},
                  .missed_zero_pages = {},
                  .survey_us = answer.survey_us};
  if (answer.audit) {
    ++audited;
    kept.unsound_pages = answer.audit->unsound_pages;
    kept.missed_zero_pages = answer.audit->missed_zero_pages;
    if (answer.audit->unsound_pages != 0) {
      ++unsound;
      if (!first_unsound)
        first_unsound = {.answer = given,
                         .boot = boot,
                         .pages = answer.audit->unsound_pages,
                         .first_page = answer.audit->first_unsound_page.value_or(0)};
    }
  }
  if (boots.empty() || boots.back().boot != boot)
    boots.push_back(kept);
  else
    boots.back() = kept;
  last = std::move(answer);
}

std::optional<std::string> find_unsound(const AnswerLog& answers) {
  const auto& first = answers.first_unsound;
  if (!first) return std::nullopt;
  if (answers.given == 1)
    return "the audit found " + std::to_string(first->pages) + " reported pages that hold data, the first is page " +
           std::to_string(first->first_page);
  return "the audit found reported pages that hold data in " + std::to_string(answers.unsound) + " of " +
         std::to_string(answers.given) + " answers, first in answer " + std::to_string(first->answer) + " (boot " +
         std::to_string(first->boot) + "): " + std::to_string(first->pages) + " pages, the first is page " +
         std::to_string(first->first_page);
}

std::optional<std::string> find_fault(const RunFigures& figures) {
  if (auto unsound = find_unsound(figures.answers)) return unsound;
  if (const std::uint64_t nonzero = figures.nonzero_pages_at_end.value_or(0); nonzero != 0)
    return "the audit found " + std::to_string(nonzero) + " pages that hold data after the guest took them for zero";
  return std::nullopt;
}

std::string to_json(const RunFigures& figures) {
  const auto& answer = figures.answers.last;
  const auto* audit = answer && answer->audit ? &*answer->audit : nullptr;

  const HeatFigures& heat = figures.heat;
  const Json hints = {{"cold_pages", heat.cold_pages},       {"hot_pages", heat.hot_pages},
                      {"discard_pages", heat.discard_pages}, {"freed_pages", heat.freed_pages},
                      {"cleared_pages", heat.cleared_pages}, {"advised_pages", heat.advised_pages},
                      {"kept_pages", heat.kept_pages},       {"failed_pages", heat.failed_pages}};
  const Json calls = {{"0x8001", figures.calls.query_capabilities},
                      {"0x8002", figures.calls.get_boot_zeroed_memory},
                      {"0x8003", figures.calls.memory_heat_hint},
                      {"other", figures.calls.other}};
  Json ranges = Json::array();
  if (answer)
    for (const auto& range : answer->ranges)
      ranges.push_back({range.first, range.count});
  Json ticks = Json::array();
  for (const auto& vcpu : figures.vcpu_ticks)
    ticks.push_back(vcpu ? Json({vcpu->user, vcpu->system}) : Json());

  const Json json = {
      {"memory_bytes", figures.options.memory_bytes},
      {"cpus", figures.options.cpus},
      {"leftovers", figures.options.leftovers},
      {"balloon_target_bytes", number_or_null(figures.options.balloon_target)},
      {"backing", to_string(figures.options.backing)},
      {"thp", to_string(figures.options.huge_pages)},
      {"populate", figures.options.populate},
      {"write_watch", figures.options.write_watch},
      {"dirty_log", figures.options.dirty_log},
      {"content_check", figures.options.content_check},
      {"hypercalls", to_string(figures.transport)},
      {"kernel_release", figures.kernel_release},
      {"kernel", figures.options.kernel.empty() ? Json() : Json(figures.options.kernel)},
      {"calls", calls},
      {"heat", hints},
      {"resets", figures.resets},
      {"answers_given", figures.answers.given},
      {"unsound_answers", figures.answers.audited != 0 ? Json(figures.answers.unsound) : Json()},
      {"boots", boots_json(figures.answers)},
      {"ranges", std::move(ranges)},
      {"ram_pages", figures.ram_pages},
      {"touched_pages", answer ? Json(answer->touched_pages) : Json()},
      {"reported_pages", answer ? answer->reported_pages : 0},
      {"reported_pages_by_2_mib", answer ? Json(answer->reported_pages_by_2_mib) : Json()},
      {"unsound_pages", audit != nullptr ? Json(audit->unsound_pages) : Json()},
      {"missed_zero_pages", audit != nullptr ? Json(audit->missed_zero_pages) : Json()},
      {"data_pages", audit != nullptr ? Json(audit->data_pages) : Json()},
      {"transparent_huge_bytes", answer ? number_or_null(answer->transparent_huge_bytes) : Json()},
      {"audit_ms", answer && answer->audit ? Json(answer->audit_ms) : Json()},
      {"survey_us", answer ? Json(answer->survey_us) : Json()},
      {"regions", answer ? regions_json(*answer) : Json::array()},
      {"guest_zeroed_pages", figures.guest ? Json(figures.guest->zeroed_pages) : Json()},
      {"guest", guest_json(figures)},
      {"nonzero_pages_at_end", number_or_null(figures.nonzero_pages_at_end)},
      {"host_resident_bytes", figures.host_resident_bytes},
      {"host_peak_bytes", number_or_null(figures.host_peak_bytes)},
      {"vcpu_ticks", std::move(ticks)},
      {"ticks_per_second", figures.ticks_per_second},
      {"vcpu_us", figures.vcpu_us},
      {"wall_ms", figures.wall_ms},
  };
  // A line for each field: 255 ranges with a line for each number would hide the rest.
  std::string text = "{\n";
  for (const auto& [name, value] : json.items())
    text += "  " + Json(name).dump() + ": " + value.dump() + ",\n";
  text.replace(text.size() - 2, 2, "\n}\n");
  return text;
}

std::string to_text(const RunFigures& figures) {
  std::string text = "memory      " + mebibytes(figures.options.memory_bytes) + ", " +
                     to_string(figures.options.backing) + ", " + std::to_string(figures.options.cpus) +
                     (figures.options.cpus == 1 ? " vCPU" : " vCPUs") + "\nhypercalls  " + to_string(figures.transport);
  if (figures.transport != Hypercalls::off)
    text += ": capabilities asked " + std::to_string(figures.calls.query_capabilities) + "x, zeroed memory " +
            std::to_string(figures.calls.get_boot_zeroed_memory) + "x";
  if (figures.answers.last) {
    const auto& answer = *figures.answers.last;
    text += "\nreported    " + share(answer.reported_pages, figures.ram_pages) + " in " +
            std::to_string(answer.ranges.size()) + (answer.ranges.size() == 1 ? " range" : " ranges") + ", survey " +
            std::to_string(static_cast<std::uint64_t>(answer.survey_us)) + " us";
    if (answer.audit)
      text += "\naudit       " + std::to_string(answer.audit->unsound_pages) + " reported pages hold data, " +
              std::to_string(answer.audit->missed_zero_pages) + " zero pages were not reported";
    if (answer.transparent_huge_bytes && *answer.transparent_huge_bytes != 0)
      text += " (" + mebibytes(*answer.transparent_huge_bytes) + " are in huge pages)";
    if (figures.answers.given > 1)
      text += "\nanswers     " + std::to_string(figures.answers.given) + ", of which this was the last" +
              (figures.answers.audited == 0
                   ? ""
                   : "; pages with data were reported in " + std::to_string(figures.answers.unsound) + " of them");
  }
  if (figures.resets != 0)
    text += "\nresets      " + std::to_string(figures.resets) +
            (figures.answers.boots.empty() ? "" : ", " + by_boot(figures.answers));
  if (figures.calls.memory_heat_hint != 0)
    text += "\nhints       " + std::to_string(figures.calls.memory_heat_hint) +
            (figures.heat.discard_pages == 0
                 ? ""
                 : ": " + mebibytes(figures.heat.freed_pages * zeroing::page_bytes) + " given back of " +
                       mebibytes(figures.heat.discard_pages * zeroing::page_bytes));
  if (figures.guest) text += "\nguest       zeroed " + share(figures.guest->zeroed_pages, figures.ram_pages);
  if (figures.guest && (figures.guest->seen & zeroing::gave_back) != 0)
    text += ", gave back " + mebibytes(figures.guest->given_back_pages * zeroing::page_bytes);
  text += "\nhost        " + mebibytes(figures.host_resident_bytes) + " resident at the end" +
          (figures.host_peak_bytes ? ", " + mebibytes(*figures.host_peak_bytes) + " at most" : "") + "\nticks      ";
  for (const auto& vcpu : figures.vcpu_ticks)
    text += vcpu ? " " + std::to_string(vcpu->user) + "+" + std::to_string(vcpu->system) : " unknown";
  text += " (user+system, by vCPU, " + std::to_string(figures.ticks_per_second) + " a second), " +
          std::to_string(static_cast<std::uint64_t>(figures.wall_ms)) + " ms\n";
  return text;
}

std::optional<Picture> to_picture(const RunFigures& figures) {
  if (!figures.answers.last) return std::nullopt;
  const AnswerFigures& answer = *figures.answers.last;
  Picture picture;
  picture.ranges = answer.picture;
  picture.backing = to_string(figures.options.backing);
  const auto add_evidence = [&](const std::string& word) {
    if (std::ranges::find(picture.evidence, word) == picture.evidence.end()) picture.evidence.push_back(word);
  };
  for (const auto& region : answer.regions) {
    add_evidence(region.evidence);
    if (region.watch && !region.watch->error) add_evidence("write_watch");
    if (region.log && !region.log->error) add_evidence("dirty_log");
    if (region.content) add_evidence("content_check");
  }
  picture.reported_pages = answer.reported_pages;
  picture.reported_ranges = answer.ranges.size();
  picture.survey_us = answer.survey_us;
  if (answer.audit)
    picture.audit = {.unsound_pages = answer.audit->unsound_pages,
                     .missed_zero_pages = answer.audit->missed_zero_pages};
  return picture;
}

} // namespace cppvmm::boot

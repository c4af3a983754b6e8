#include "draw.hpp"

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <tuple>
#include <utility>
#include <vector>

// Its headers use what newer standard libraries call deprecated in C++23, and more so where they are instantiated.
#pragma clang diagnostic push
#pragma clang diagnostic ignored "-Wdeprecated-declarations"
#include <rapidcheck.h>
#pragma clang diagnostic pop

namespace cppvmm::oracle {
namespace {

/// Small numbers often, large ones sometimes: 1 to 2^most_bits.
rc::Gen<std::uint32_t> skewed(int most_bits) {
  return rc::gen::map(
      rc::gen::pair(rc::gen::inRange(0, most_bits + 1), rc::gen::inRange<std::uint32_t>(0, std::uint32_t{1} << 24)),
      [](std::pair<int, std::uint32_t> drawn) { return 1 + drawn.second % (std::uint32_t{1} << drawn.first); });
}

rc::Gen<Memory> memories(const Profile& profile) {
  const std::size_t files = profile.files ? 2 : 0;
  const std::size_t huge = profile.huge_pages ? 6 : 0;
  return rc::gen::weightedElement<Memory>({{10, Memory::anonymous},
                                           {10, Memory::memfd},
                                           {5, Memory::adopted_anonymous},
                                           {5, Memory::adopted_memfd},
                                           {4, Memory::shared_anonymous},
                                           {files, Memory::private_file},
                                           {files, Memory::adopted_private_file},
                                           {files, Memory::shared_file},
                                           {huge, Memory::hugetlb},
                                           {huge, Memory::hugetlb_memfd},
                                           {1, Memory::unknown}});
}

rc::Gen<RegionSpec> regions(const Profile& profile) {
  const int bits = profile.large ? 14 : 11;
  return rc::gen::map(
      rc::gen::tuple(
          memories(profile), skewed(bits), rc::gen::inRange<std::uint32_t>(0, 24), rc::gen::inRange(0, 12),
          rc::gen::weightedElement<Thp>({{6, Thp::forbidden}, {1, Thp::wanted}, {3, Thp::unstated}}),
          rc::gen::weightedElement<Before>({{20, Before::nothing}, {1, Before::populated}, {1, Before::locked}}),
          rc::gen::inRange<std::uint32_t>(0, 1000)),
      [](std::tuple<Memory, std::uint32_t, std::uint32_t, int, Thp, Before, std::uint32_t> drawn) {
        const auto [memory, pages, hole, rom, thp, before, file_seed] = drawn;
        RegionSpec spec{.memory = memory,
                        .pages = pages,
                        .hole_before = hole < 12 ? 0 : hole, // regions that touch are worth having
                        .rom = rom == 11,
                        .thp = thp,
                        .before = before,
                        .file_seed = file_seed};
        if (is_hugetlb(memory)) spec.pages = 512 * (1 + pages % 4);
        // Populating costs memory and tells little.
        if (before != Before::nothing) spec.pages = 1 + (spec.pages - 1) % 600;
        return spec;
      });
}

rc::Gen<Writer> writers(const Profile& profile) {
  const std::size_t vcpu = profile.vcpus ? 14 : 0;
  const std::size_t swap = profile.swap ? 12 : 1;
  return rc::gen::weightedElement<Writer>({{10, Writer::typed_write},
                                           {10, Writer::raw_pointer},
                                           {2, Writer::scatter},
                                           {5, Writer::zero_write},
                                           {4, Writer::data_then_zero},
                                           {6, Writer::read_touch},
                                           {5, Writer::read_from_pipe},
                                           {4, Writer::process_vm_writev},
                                           {8, Writer::other_mapping},
                                           {6, Writer::other_pwrite},
                                           {1, Writer::fork_child},
                                           {10, Writer::discard},
                                           {5, Writer::library_discard},
                                           {5, Writer::heat_hint},
                                           {1, Writer::reset},
                                           {5, Writer::drop_entries},
                                           {2, Writer::allocate},
                                           {2, Writer::populate},
                                           {1, Writer::set_huge_pages},
                                           {2, Writer::remap},
                                           {2, Writer::replace},
                                           {swap, Writer::page_out},
                                           {1, Writer::cold},
                                           {1, Writer::collapse},
                                           {3, Writer::survey},
                                           {1, Writer::mark},
                                           {vcpu, Writer::vcpu_store},
                                           {vcpu / 2, Writer::vcpu_read},
                                           {vcpu / 2, Writer::vcpu_page_walk}});
}

rc::Gen<Step> steps(const Profile& profile) {
  return rc::gen::map(
      rc::gen::tuple(writers(profile), rc::gen::inRange<std::uint8_t>(0, 6),
                     rc::gen::inRange<std::uint32_t>(0, 1 << 14), skewed(5), rc::gen::inRange<std::uint8_t>(1, 255),
                     rc::gen::inRange<std::uint8_t>(0, 8)),
      [](std::tuple<Writer, std::uint8_t, std::uint32_t, std::uint32_t, std::uint8_t, std::uint8_t> drawn) {
        const auto [writer, region, page, count, value, variant] = drawn;
        return Step{
            .writer = writer, .region = region, .page = page, .count = count, .value = value, .variant = variant};
      });
}

/// Numbers come from their whole range, whatever the size, which is for containers.
template <class T>
rc::Gen<T> whole(rc::Gen<T> gen) {
  return rc::gen::resize(rc::kNominalSize, std::move(gen));
}

rc::Gen<SurveyMode> modes(const Profile& profile) {
  const std::size_t vcpu = profile.vcpus ? 3 : 0;
  return rc::gen::weightedElement<SurveyMode>({{2, SurveyMode::newest},
                                               {1, SurveyMode::legacy},
                                               {3, SurveyMode::content_check},
                                               {3, SurveyMode::write_watch},
                                               {vcpu, SurveyMode::dirty_log}});
}

rc::Gen<Case> cases(const Profile& profile) {
  return rc::gen::map(
      rc::gen::tuple(
          rc::gen::resize(7, rc::gen::nonEmpty(rc::gen::container<std::vector<RegionSpec>>(whole(regions(profile))))),
          rc::gen::container<std::vector<Step>>(whole(steps(profile))), whole(modes(profile)),
          whole(rc::gen::inRange<std::uint8_t>(0, 16)), whole(rc::gen::inRange<std::uint8_t>(0, 6)),
          whole(rc::gen::inRange<std::uint32_t>(0, 1 << 14)), whole(rc::gen::inRange(0, 2)),
          whole(rc::gen::inRange<std::uint32_t>(0, 1 << 14)), whole(rc::gen::inRange<std::uint32_t>(0, 40))),
      [profile](std::tuple<std::vector<RegionSpec>, std::vector<Step>, SurveyMode, std::uint8_t, std::uint8_t,
                           std::uint32_t, int, std::uint32_t, std::uint32_t>
                    drawn) {
        auto& [regions, steps, mode, options, output_region, output_page, at_8, leave_out_page, leave_out] = drawn;
        if (regions.size() > 6) regions.resize(6);
        mode = profile.mode.value_or(mode);
        options = profile.mode_options.value_or(options);
        return Case{.regions = std::move(regions),
                    .steps = std::move(steps),
                    .mode = mode,
                    .mode_options = options,
                    .output_region = output_region,
                    .output_page = output_page,
                    .output_at_8 = at_8 == 1,
                    .leave_out_page = leave_out_page,
                    .leave_out_count = leave_out > 30 ? leave_out - 30 : 0};
      });
}

/// Half of the cases are short; the size is the most steps that a case has.
rc::Shrinkable<Case> drawn(std::uint64_t seed, const Profile& profile) {
  const int size = seed % 16 == 0 ? 400 : seed % 2 == 0 ? 12 : 60;
  return cases(profile)(rc::Random(seed), size);
}

} // namespace

Case draw(std::uint64_t seed, const Profile& profile) { return drawn(seed, profile).value(); }

Case shrink(std::uint64_t seed, const Profile& profile, const std::function<bool(const Case&)>& fails,
            std::size_t most_tries, std::chrono::seconds most_time) {
  const auto until = std::chrono::steady_clock::now() + most_time;
  std::size_t tries = 0;
  const auto goes_on = [&] { return ++tries <= most_tries && std::chrono::steady_clock::now() < until; };
  return rc::shrinkable::findLocalMin(drawn(seed, profile),
                                      [&](const Case& smaller) { return goes_on() && fails(smaller); })
      .first;
}

} // namespace cppvmm::oracle

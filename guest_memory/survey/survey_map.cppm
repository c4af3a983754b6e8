module;
#include "../memory/extents.hpp"
module cppvmm.guest_memory:survey_map;
import :content_scan;
import :memory_map;
import :region;
import :survey;
import :survey_stop;
import :write_record;

namespace cppvmm {

/// The survey of one snapshot, without marks. What is known of writes is looked up for the regions that have it;
/// content is looked at as far as `budget` goes, if there is one. Once `stop` is set, all that has not been looked at
/// counts as touched.
[[nodiscard]] Survey survey_map(const MemoryMap& map, const SurveyOptions& options, const WriteKnowledge& writes,
                                ContentBudget* budget, const SurveyStop& stop);

/// Those of the pages that may hold data, by a look at the content of all that can be looked at.
[[nodiscard]] ExtentList data_among(const Region& region, const ExtentList& pages);

} // namespace cppvmm

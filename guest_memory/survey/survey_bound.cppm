module;
#include <cstddef>

#include "../memory/extents.hpp"

module cppvmm.guest_memory:survey_bound;
import :error;
import :marks;
import :survey;

namespace cppvmm {

/// Ranges of zeroed pages that a survey keeps, of all its regions together.
inline constexpr std::size_t most_survey_ranges = ExtentList::default_limit;

/// To be called after each region, with the report of each in `survey.regions`: where there are more ranges of RAM that
/// is not touched, all but the `most_survey_ranges / 2` largest are given up and count as touched. So no answer lacks
/// any that it could have room for; one that reaches to the end of the RAM so far is kept, for it may go on.
void bound_ranges(Survey& survey);

/// All RAM counts as touched, for that reason: of each region that has no other.
void lose_evidence(Survey& survey, const MemoryError& why);

/// Adds what is marked of the regions that the survey has, which it bounds anew, and who marked it. Where others hold
/// the marks until the survey is to end, all RAM counts as touched.
void add_marks(Survey& survey, const Marks& marks);

} // namespace cppvmm

// cppvmm-boot: the reference VMM. Boots a guest that wants its memory zeroed and tells it which memory is zero already.
#include "machine.hpp"
#include "options.hpp"
#include "report.hpp"

#include <cstdint>
#include <cstdio>
#include <exception>
#include <fstream>
#include <ios>
#include <string>

namespace {

using namespace cppvmm::boot;

int complain(const std::string& text, int status = 1) {
  std::fprintf(stderr, "cppvmm-boot: %s\n", text.c_str());
  return status;
}

int run(const Options& options) {
  const auto ran = run_zeroing_guest(options);
  if (!ran) return complain(ran.error().text, ran.error().status);
  const RunFigures& figures = *ran;

  std::fputs((options.json == "-" ? to_json(figures) : to_text(figures)).c_str(), stdout);
  if (std::fflush(stdout) != 0) return complain("cannot write to standard output");
  if (!options.json.empty() && options.json != "-") {
    std::ofstream file(options.json, std::ios::binary | std::ios::trunc);
    file << to_json(figures) << std::flush;
    if (!file) return complain("cannot write " + options.json);
  }

  const AuditFigures audit = figures.answer ? figures.answer->audit.value_or(AuditFigures()) : AuditFigures();
  if (audit.unsound_pages != 0)
    return complain("the audit found " + std::to_string(audit.unsound_pages) +
                    " reported pages that hold data, the first is page " +
                    std::to_string(audit.first_unsound_page.value_or(0)));
  if (const std::uint64_t nonzero = figures.nonzero_pages_at_end.value_or(0); nonzero != 0)
    return complain("the audit found " + std::to_string(nonzero) +
                    " pages that hold data after the guest took them for zero");
  return 0;
}

} // namespace

int main(int argc, char** argv) {
  try {
    const auto options = parse_options(argc, argv);
    if (!options) {
      std::fputs(options.error().text.c_str(), options.error().status == 0 ? stdout : stderr);
      return options.error().status;
    }
    return run(*options);
  } catch (const std::exception& error) {
    return complain(error.what());
  }
}

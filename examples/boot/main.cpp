// cppvmm-boot: the reference VMM. Boots a guest that wants its memory zeroed and tells it which memory is zero already.
#include "machine.hpp"
#include "options.hpp"
#include "report.hpp"

#include <charconv>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <ios>
#include <optional>
#include <string>
#include <string_view>
#include <sys/ioctl.h>
#include <unistd.h>

namespace {

using namespace cppvmm::boot;

int complain(const std::string& text, int status = 1) {
  std::fprintf(stderr, "cppvmm-boot: %s\n", text.c_str());
  return status;
}

bool write_file(const std::string& path, const std::string& text) {
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  file << text << std::flush;
  return !file.fail();
}

/// For standard output: as wide as it is, and coloured, where it is a terminal. Elsewhere $COLUMNS and $CLICOLOR_FORCE
/// say what the reader's terminal is; $NO_COLOR comes before it (https://no-color.org, https://bixense.com/clicolors).
std::string terminal_form(const Picture& picture) {
  const auto variable = [](const char* name) {
    const char* value = std::getenv(name);
    return std::string_view(value == nullptr ? "" : value);
  };
  winsize size{};
  const bool terminal = isatty(STDOUT_FILENO) == 1;
  unsigned columns = 80;
  if (terminal && ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col != 0)
    columns = size.ws_col;
  else if (const std::string_view said = variable("COLUMNS"); !terminal && !said.empty())
    std::from_chars(said.data(), said.data() + said.size(), columns);
  const bool forced = !variable("CLICOLOR_FORCE").empty() && variable("CLICOLOR_FORCE") != "0";
  const bool colour = forced || (terminal && variable("TERM") != "dumb");
  return to_terminal(picture, columns, colour && variable("NO_COLOR").empty());
}

int run(const Options& options) {
  const auto ran = run_guest(options);
  if (!ran) return complain(ran.error().text, ran.error().status);
  const RunFigures& figures = *ran;

  std::fputs((options.json == "-" ? to_json(figures) : to_text(figures)).c_str(), stdout);
  const auto picture = options.map.empty() ? std::nullopt : to_picture(figures);
  if (picture && options.json != "-") std::fputs(("\n" + terminal_form(*picture)).c_str(), stdout);
  if (std::fflush(stdout) != 0) return complain("cannot write to standard output");
  if (!options.json.empty() && options.json != "-" && !write_file(options.json, to_json(figures)))
    return complain("cannot write " + options.json);
  if (picture && !write_file(options.map, to_svg(*picture))) return complain("cannot write " + options.map);
  if (!options.map.empty() && !picture) complain("--map: the guest never asked, so there is nothing to draw");

  if (const auto fault = find_fault(figures)) return complain(*fault);
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

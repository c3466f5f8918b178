// The choice of kernels: what this CPU lacks is refused with a message and never run.
#include "engine/isa.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "check.h"
#include "engine/errors.h"
#include "engine/kernels/table.h"

using potluck::AvailableIsas;
using potluck::ChooseTable;
using potluck::CompiledIsas;

namespace {

std::string Listed(const std::vector<std::string>& names) {
  std::string all;
  for (const std::string& name : names) all += (all.empty() ? "" : " ") + name;
  return all;
}

// What EngineError says, or nothing.
std::string Refusal(const std::string& isa) {
  try {
    ChooseTable(isa);
  } catch (const potluck::EngineError& error) {
    return error.what();
  }
  return "";
}

}  // namespace

// POTLUCK_EXPECTED_ISAS: what scripts/test knows of this or the emulated CPU, "scalar neon"; empty
// where it knows nothing.
TEST(the_tables_of_this_cpu_are_those_expected) {
  const std::string here = Listed(AvailableIsas());
  std::printf("this CPU runs %s\n", here.c_str());
  const char* const expected = std::getenv("POTLUCK_EXPECTED_ISAS");
  if (expected != nullptr && *expected != '\0') CHECK_EQ(here, std::string(expected));
}

TEST(every_table_that_runs_here_can_be_chosen_and_the_last_is_automatic) {
  for (const std::string& isa : AvailableIsas()) CHECK_EQ(ChooseTable(isa).name, isa);
  if (std::getenv("POTLUCK_ISA") == nullptr)
    CHECK_EQ(ChooseTable("auto").name, AvailableIsas().back());
}

TEST(a_table_that_this_cpu_lacks_is_refused) {
  const std::vector<std::string> here = AvailableIsas();
  for (const std::string& isa : CompiledIsas()) {
    const bool runs = std::find(here.begin(), here.end(), isa) != here.end();
    CHECK_EQ(Refusal(isa).find("this CPU lacks it") != std::string::npos, !runs);
  }
}

TEST(a_name_that_no_table_has_is_refused) {
  CHECK(Refusal("nonsense").find("no such instruction set") != std::string::npos);
}

CHECK_MAIN

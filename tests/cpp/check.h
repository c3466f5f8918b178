// A test is a function with a sentence for a name; a failed check prints where and why, and the
// program exits with 1.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <exception>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

namespace check {

struct Test {
  const char* name;
  void (*run)();
};
inline std::vector<Test>& Tests() {
  static std::vector<Test> tests;
  return tests;
}
inline int& Failures() {
  static int failures = 0;
  return failures;
}
struct Registration {
  Registration(const char* name, void (*run)()) { Tests().push_back({name, run}); }
};
inline void Fail(const char* file, int line, const std::string& what) {
  std::printf("%s:%d: %s\n", file, line, what.c_str());
  ++Failures();
}
template <class A, class B>
void Equal(const A& a, const B& b, const char* text, const char* file, int line) {
  if (a == b) return;
  std::ostringstream out;
  out << text << ": " << a << " is not " << b;
  Fail(file, line, out.str());
}

// An emulated CPU and the thread sanitizer take some twenty times as long: POTLUCK_SHORT_TESTS
// asks for the cases that no other case stands for.
inline bool IsShort() {
  static const char* const wanted = std::getenv("POTLUCK_SHORT_TESTS");
  return wanted != nullptr && *wanted != '\0';
}

// Runs every test of the file (or those whose name holds argv[1]) and says how many.
inline int Main(int argc, char** argv) {
  const std::string only = argc > 1 ? argv[1] : "";
  int ran = 0, failed = 0;
  if (IsShort()) std::printf("short lists of cases: POTLUCK_SHORT_TESTS is set\n");
  for (const Test& test : Tests()) {
    if (std::string(test.name).find(only) == std::string::npos) continue;
    const int before = Failures();
    try {
      test.run();
    } catch (const std::exception& error) {
      Fail(test.name, 0, std::string("threw ") + error.what());
    }
    ++ran;
    failed += Failures() > before;
    if (Failures() > before) std::printf("FAILED %s\n", test.name);
  }
  std::printf("%d passed, %d failed\n", ran - failed, failed);
  return failed != 0 || ran == 0;
}

}  // namespace check

#define TEST(name)                                               \
  static void name();                                            \
  static const check::Registration register_##name{#name, name}; \
  static void name()
#define CHECK(claim)                                       \
  do {                                                     \
    if (!(claim)) check::Fail(__FILE__, __LINE__, #claim); \
  } while (false)
#define CHECK_EQ(a, b) check::Equal((a), (b), #a, __FILE__, __LINE__)
#define CHECK_THROWS(statement, Error)                                            \
  do {                                                                            \
    bool thrown = false;                                                          \
    try {                                                                         \
      statement;                                                                  \
    } catch (const Error&) {                                                      \
      thrown = true;                                                              \
    }                                                                             \
    if (!thrown) check::Fail(__FILE__, __LINE__, #statement " threw no " #Error); \
  } while (false)
#define CHECK_MAIN \
  int main(int argc, char** argv) { return check::Main(argc, argv); }

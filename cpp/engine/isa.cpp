#include "engine/isa.h"

#include <array>
#include <cstdlib>

#if defined(POTLUCK_X86)
#include <cpuid.h>
#endif
#if defined(POTLUCK_ARM64) && defined(__linux__)
#include <sys/auxv.h>
#endif
#if defined(POTLUCK_ARM64) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#include "engine/errors.h"
#include "engine/kernels/attention_table.h"
#include "engine/kernels/matmul_table.h"
#include "engine/kernels/vector_table.h"

namespace potluck {
namespace {

bool RunsBaseline() { return true; }

// [[maybe_unused]]: a compiler may lack a table (CMakeLists.txt).
#if defined(POTLUCK_X86)
// Older clangs know no "f16c" in the detection below.
bool HasF16c() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}

// The compiler's detection asks the system too whether it saves the wide registers.
bool RunsAvx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && HasF16c() &&
         __builtin_cpu_supports("bmi2");
}

// Not every compiler's detection knows the name.
[[maybe_unused]] bool RunsAvxVnni() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return RunsAvx2() && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0 && (eax >> 4 & 1u) != 0;
}

[[maybe_unused]] bool RunsAvx512Vnni() {
  return RunsAvx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni");
}
#endif

#if defined(POTLUCK_ARM64) && defined(__APPLE__)
// feature: a name below hw.optional.arm
bool Has(const char* feature) {
  int value = 0;
  size_t size = sizeof value;
  return sysctlbyname(feature, &value, &size, nullptr, 0) == 0 && value != 0;
}
[[maybe_unused]] bool RunsDotProd() { return Has("hw.optional.arm.FEAT_DotProd"); }
[[maybe_unused]] bool RunsI8mm() { return RunsDotProd() && Has("hw.optional.arm.FEAT_I8MM"); }
#elif defined(POTLUCK_ARM64)
// Bits of the kernel's arch/arm64/include/uapi/asm/hwcap.h, which older system headers lack.
constexpr unsigned long kHwcapDotProd = 1UL << 20;
constexpr unsigned long kHwcap2I8mm = 1UL << 13;

[[maybe_unused]] bool RunsDotProd() { return (getauxval(AT_HWCAP) & kHwcapDotProd) != 0; }
[[maybe_unused]] bool RunsI8mm() {
  return RunsDotProd() && (getauxval(AT_HWCAP2) & kHwcap2I8mm) != 0;
}
#endif

struct Isa {
  KernelTable table;
  bool (*runs_here)();
};

// All that are compiled in, the better the later.
const auto& Isas() {
  static const auto isas = std::array{
      Isa{{"scalar", ScalarMatMulTable(), ScalarVectorTable(), ScalarAttentionTable()},
          RunsBaseline},
#if defined(POTLUCK_X86)
      Isa{{"avx2", Avx2MatMulTable(), Avx2VectorTable(), Avx2AttentionTable()}, RunsAvx2},
#endif
#if defined(POTLUCK_AVXVNNI)
      Isa{{"avxvnni", AvxVnniMatMulTable(), Avx2VectorTable(), Avx2AttentionTable()}, RunsAvxVnni},
#endif
#if defined(POTLUCK_AVX512VNNI)
      Isa{{"avx512vnni", Avx512VnniMatMulTable(), Avx2VectorTable(), Avx512VnniAttentionTable()},
          RunsAvx512Vnni},
#endif
#if defined(POTLUCK_ARM64)
      Isa{{"neon", NeonMatMulTable(), NeonVectorTable(), NeonAttentionTable()}, RunsBaseline},
#endif
#if defined(POTLUCK_DOTPROD)
      Isa{{"dotprod", DotProdMatMulTable(), NeonVectorTable(), NeonAttentionTable()}, RunsDotProd},
#endif
#if defined(POTLUCK_I8MM)
      Isa{{"i8mm", I8mmMatMulTable(), NeonVectorTable(), NeonAttentionTable()}, RunsI8mm},
#endif
  };
  return isas;
}

std::string Joined(const std::vector<std::string>& names) {
  std::string all;
  for (const std::string& name : names) all += (all.empty() ? "" : ", ") + name;
  return all;
}

}  // namespace

std::vector<std::string> CompiledIsas() {
  std::vector<std::string> names;
  for (const Isa& isa : Isas()) names.emplace_back(isa.table.name);
  return names;
}

std::vector<std::string> AvailableIsas() {
  std::vector<std::string> names;
  for (const Isa& isa : Isas())
    if (isa.runs_here()) names.emplace_back(isa.table.name);
  return names;
}

const KernelTable& ChooseTable(std::string_view isa) {
  std::string wanted(isa);
  const char* forced = std::getenv("POTLUCK_ISA");  // NOLINT(concurrency-mt-unsafe): never set here
  const bool obeys = wanted == "auto" && forced != nullptr && *forced != '\0';
  if (obeys) wanted = forced;
  const std::string source = obeys ? "POTLUCK_ISA=" : "isa ";
  if (wanted == "auto") wanted = AvailableIsas().back();
  for (const Isa& known : Isas()) {
    if (wanted != known.table.name) continue;
    if (known.runs_here()) return known.table;
    throw EngineError(source + wanted + ": this CPU lacks it",
                      "use one of: auto, " + Joined(AvailableIsas()));
  }
  throw EngineError(source + wanted + ": there is no such instruction set here; compiled in are " +
                        Joined(CompiledIsas()),
                    "use one of: auto, " + Joined(AvailableIsas()));
}

}  // namespace potluck

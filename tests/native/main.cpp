// usage: native_tests [part of a name]
#include <cstdio>
#include <exception>

#include "check.h"

namespace tkt::test {

std::vector<Test>& all_tests() {
  static std::vector<Test> tests;
  return tests;
}

}  // namespace tkt::test

int main(int argc, char** argv) {
  int ran = 0;
  int failed = 0;
  for (const tkt::test::Test& test : tkt::test::all_tests()) {
    if (argc > 1 && test.name.find(argv[1]) == std::string::npos) continue;
    ++ran;
    try {
      test.run();
      std::printf("ok      %s\n", test.name.c_str());
    } catch (const std::exception& error) {
      ++failed;
      std::printf("FAILED  %s\n        %s\n", test.name.c_str(), error.what());
    }
    std::fflush(stdout);
  }
  std::printf("%d of %d tests failed\n", failed, ran);
  return failed == 0 && ran > 0 ? 0 : 1;
}

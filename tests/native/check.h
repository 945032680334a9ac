// Tests of the C++ code that run under sanitizers: TEST(fact) { CHECK(claim); } in any file of this folder.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace tkt::test {

struct Test {
  std::string name;
  void (*run)();
};

std::vector<Test>& all_tests();

struct Registration {
  Registration(const char* name, void (*run)()) { all_tests().push_back({name, run}); }
};

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Collects what is said behind CHECK, and throws it at the end of the statement.
class Report {
 public:
  Report(const char* file, int line, const char* claim) {
    text_ << file << ":" << line << ": not so: " << claim << " ";
  }
  ~Report() noexcept(false) { throw Failure(text_.str()); }
  template <typename Value>
  Report& operator<<(const Value& value) {
    text_ << value;
    return *this;
  }

 private:
  std::ostringstream text_;
};

}  // namespace tkt::test

#define TEST(fact)                                                          \
  static void fact();                                                       \
  static const tkt::test::Registration registration_of_##fact(#fact, fact); \
  static void fact()

#define CHECK(claim) \
  if (!(claim)) tkt::test::Report(__FILE__, __LINE__, #claim)

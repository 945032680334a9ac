#include "machine/file.h"

#include <unistd.h>

#include <cerrno>
#include <system_error>

namespace tkt {

int64_t read_at(int descriptor, int64_t offset, int64_t bytes, uint8_t* to) {
  int64_t done = 0;
  while (done < bytes) {
    const ssize_t count = pread(descriptor, to + done, static_cast<size_t>(bytes - done), offset + done);
    if (count == 0) break;
    if (count > 0) {
      done += count;
    } else if (errno != EINTR) {
      throw std::system_error(errno, std::generic_category());
    }
  }
  return done;
}

}  // namespace tkt

// Lets a wheel that is built on a later glibc load on glibc 2.28, the oldest of manylinux_2_28. The static libstdc++ of
// the build machine asks for the versions that its glibc exports first, such as pthread_create@GLIBC_2.34. The linker
// prefers these definitions, which call the older versions of the same functions. On glibc 2.28 itself this file is
// empty.
#include <features.h>

#if __GLIBC_PREREQ(2, 29)

#include <pthread.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <time.h>

#include <cstdint>

#define OLD(name) __asm__(".symver old_" #name "," #name "@GLIBC_2.2.5")

extern "C" {
OLD(pthread_create);
OLD(pthread_detach);
OLD(pthread_join);
OLD(pthread_mutex_trylock);
OLD(pthread_once);
OLD(pthread_key_create);
OLD(pthread_key_delete);
OLD(pthread_getspecific);
OLD(pthread_setspecific);
OLD(__fxstat64);

int old_pthread_create(pthread_t*, const pthread_attr_t*, void* (*)(void*), void*);
int old_pthread_detach(pthread_t);
int old_pthread_join(pthread_t, void**);
int old_pthread_mutex_trylock(pthread_mutex_t*);
int old_pthread_once(pthread_once_t*, void (*)());
int old_pthread_key_create(pthread_key_t*, void (*)(void*));
int old_pthread_key_delete(pthread_key_t);
void* old_pthread_getspecific(pthread_key_t);
int old_pthread_setspecific(pthread_key_t, const void*);
int old___fxstat64(int, int, struct stat64*);

int pthread_create(pthread_t* thread, const pthread_attr_t* attributes, void* (*start)(void*), void* argument) {
  return old_pthread_create(thread, attributes, start, argument);
}
int pthread_detach(pthread_t thread) { return old_pthread_detach(thread); }
int pthread_join(pthread_t thread, void** result) { return old_pthread_join(thread, result); }
int pthread_mutex_trylock(pthread_mutex_t* mutex) noexcept { return old_pthread_mutex_trylock(mutex); }
int pthread_once(pthread_once_t* control, void (*routine)()) { return old_pthread_once(control, routine); }
int pthread_key_create(pthread_key_t* key, void (*destructor)(void*)) {
  return old_pthread_key_create(key, destructor);
}
int pthread_key_delete(pthread_key_t key) noexcept { return old_pthread_key_delete(key); }
void* pthread_getspecific(pthread_key_t key) noexcept { return old_pthread_getspecific(key); }
int pthread_setspecific(pthread_key_t key, const void* value) noexcept { return old_pthread_setspecific(key, value); }

// 1 is the version of struct stat on x86-64.
int fstat64(int file, struct stat64* status) noexcept { return old___fxstat64(1, file, status); }

// Glibc 2.28 waits by the real-time clock alone, as libstdc++ did there: the time left on `clock` is added to it.
int pthread_cond_clockwait(pthread_cond_t* condition, pthread_mutex_t* mutex, clockid_t clock,
                           const struct timespec* until) {
  struct timespec now;
  struct timespec end;
  clock_gettime(clock, &now);
  clock_gettime(CLOCK_REALTIME, &end);
  constexpr long kSecond = 1000000000;
  const long nanoseconds = end.tv_nsec + until->tv_nsec - now.tv_nsec + kSecond;  // from 0 to below 3 seconds
  end.tv_sec += until->tv_sec - now.tv_sec - 1 + nanoseconds / kSecond;
  end.tv_nsec = nanoseconds % kSecond;
  return pthread_cond_timedwait(condition, mutex, &end);
}

// Reference counts are always atomic: what glibc 2.28 does.
char __libc_single_threaded = 0;

uint32_t arc4random() {
  uint32_t value = 0;
  while (getrandom(&value, sizeof value, 0) != sizeof value) {
  }
  return value;
}
}

#endif
